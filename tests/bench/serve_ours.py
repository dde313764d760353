"""Our side of `tests.bench.serve`: the service on a port, or the bare engine under the service's scheduler, asked by threads of this process.

python -m tests.bench.serve_ours <kind> <quantization> <folder> <port>
python -m tests.bench.serve_ours <kind> <quantization> <folder> bare     # texts on stdin as JSON, figures on stdout
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import uvicorn

import conf
from conf.schema import Serve
from stages.files import sha256
from stages.serve.api import create_app, open_service
from stages.serve.assistant import Assistant
from stages.serve.database import address
from stages.serve.engine import Sampling, open_engine
from stages.serve.guard.guard import Guard
from stages.serve.jobs import Job
from stages.serve.keys import Keyring
from stages.serve.scheduler import Scheduler
from stages.serve.store import Store
from stages.serve.text import TextStream
from tests.bench.serve_load import LEVELS, REQUESTS, SYSTEM, TOKENS, Answer, chosen, figure


def load(kind: str, quantization: str, folder: Path) -> Assistant:
    """The engine behind the guard of models/guard."""
    settings: Serve = conf.load("serve")
    settings = replace(settings, engine=replace(settings.engine, kind=kind, quantization=quantization))
    guard = Path("models/guard")
    engine = open_engine(folder, settings.engine, batches=True)
    return Assistant(name="ours", digest=sha256(folder), engine=engine, guard=Guard(guard if guard.is_dir() else None, settings.guard), settings=settings)


def serve(assistant: Assistant, port: int) -> None:
    """Until it is terminated."""
    app = create_app()
    open_service(app, assistant, Keyring([]), Store(address(os.environ), assistant.settings.events.days))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def ask(assistant: Assistant, scheduler: Scheduler, text: str) -> Answer:
    """One answer, as the service makes it of a request, without guard and HTTP."""
    chat, over, times = assistant.engine.chat, threading.Event(), list[float]()
    prompt = chat.prompt([{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}])
    sampling, began = Sampling(max_tokens=TOKENS), time.monotonic()
    job = Job(prompt=prompt, sampling=sampling, text=TextStream(chat), on_text=lambda _: times.append(time.monotonic()), on_end=over.set, deadline=began + 600)
    scheduler.submit([job])
    over.wait()
    return Answer(tokens=len(job.tokens), first=times[0] - began, last=times[-1] - began)


def bare(assistant: Assistant, texts: list[str]) -> None:
    """Measure at every number of streams."""
    settings = assistant.settings
    scheduler = Scheduler(assistant.engine, slots=settings.engine.threads, batch=settings.engine.batch, most_waiting=64, kept=assistant.kept())
    ask(assistant, scheduler, "hello")
    found = {}
    for streams in LEVELS:
        answers: list[Answer] = []

        def stream(number: int, streams: int = streams, answers: list[Answer] = answers) -> None:
            for i in range(REQUESTS[streams]):
                answers.append(ask(assistant, scheduler, chosen(texts, streams, number, i)))

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(streams)]
        began, spent = time.monotonic(), time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found[streams] = asdict(figure(answers, time.monotonic() - began, time.process_time() - spent))
    scheduler.close()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    made = load(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    if sys.argv[4] == "bare":
        bare(made, json.load(sys.stdin))
    else:
        serve(made, int(sys.argv[4]))
