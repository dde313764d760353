"""The service over a small random model, in a real server on a port of its own."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from conf.schema import EngineSettings, GuardRule, Serve, ServeGuard, ServeLimits
from stages.converters import CONVERT
from stages.serve.api import create_app, open_service
from stages.serve.assistant import Assistant
from stages.serve.engine import Engine, Sampling, open_engine
from stages.serve.guard.guard import Guard as Watch
from stages.serve.keys import Key, Keyring
from stages.serve.store import Store
from tests.models import tiny_llama

LLAMACPP = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
NAME, DIGEST = "kestrel-desk", "d" * 64
RULES = {"override": GuardRule(pattern=r"ignore (all|previous) instructions")}


ENGINES = {
    "openvino": EngineSettings(threads=2, batch=8, context=2**17),
    "ctranslate2": EngineSettings(kind="ctranslate2", threads=2, batch=8),
    "llamacpp": EngineSettings(kind="llamacpp", quantization="float32", threads=2, batch=8, context=4096),
}


def settings(kind: str = "openvino", **more: object) -> Serve:
    """Of the small service."""
    limits = more.pop("limits", ServeLimits())
    given = {"max_tokens": 64, "max_prompt_tokens": 200, "system": "Be brief.", "guard": ServeGuard(rules=RULES)} | more
    return Serve(engine=ENGINES[kind], limits=limits, **given)  # type: ignore[arg-type]


def model(folder: Path, kind: str = "openvino") -> Path:
    """A small engine."""
    CONVERT[kind](tiny_llama(folder / "hf"), folder / "engine", ENGINES[kind].quantization)
    return folder / "engine"


def endless(engine: Engine) -> Engine:
    """Give it an end token that it never says: its answers then go on to `max_tokens`."""
    prompts = [engine.chat.encode(text) for text in ("where is", "a", "status", "order size", "tent", "you", "please", "refund")]
    said = {token for answer in engine.generate(prompts, Sampling(max_tokens=600, temperature=1.0)) for token in answer.tokens}
    never = max(set(range(3, engine.chat.vocab_size)) - said)
    engine._ends, engine.chat.eos_ids = [never], {never}  # type: ignore[attr-defined]
    return engine


def assistant(engine: Path, serve: Serve) -> Assistant:
    """The small model behind its guard."""
    return Assistant(name=NAME, digest=DIGEST, engine=open_engine(engine, serve.engine, batches=True), guard=Watch(None, serve.guard), settings=serve)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running service."""

    url: str
    app: FastAPI
    assistant: Assistant
    events: str
    """URL of its database."""
    server: uvicorn.Server


@contextmanager
def serve(engine: Path, folder: Path, serve: Serve, keys: Sequence[Key] = (), made: Assistant | None = None) -> Iterator[Served]:
    """Run it in this process until the end of the block; `made`: on this one."""
    app, loaded, events = create_app(), made or assistant(engine, serve), f"sqlite:///{folder / 'events.sqlite'}"
    open_service(app, loaded, Keyring(keys), Store(events, serve.events.days))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(url=f"http://127.0.0.1:{port}", app=app, assistant=loaded, events=events, server=server)
    finally:
        server.should_exit = True
        thread.join(60)


def until_ready(url: str, started: subprocess.Popen[bytes]) -> None:
    """Wait until a service that was started answers, whatever it says."""
    for _ in range(600):
        try:
            httpx.get(f"{url}/readyz")
            break
        except httpx.TransportError:
            assert started.poll() is None
            time.sleep(0.1)


@contextmanager
def process(
    engine: Path, folder: Path, environment: Mapping[str, str], waiting: int = 64, events: str | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run it in a process of its own, which the caller may kill; `events`: URL of its database, else one in the folder."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.served", str(engine), events or f"sqlite:///{folder / 'events.sqlite'}", str(port), str(waiting)], env=dict(environment)
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until_ready(url, started)
        yield url, started
    finally:
        started.kill()
        started.wait()


if __name__ == "__main__":
    app = create_app()
    wanted = settings(max_tokens=512, max_prompt_tokens=1000, limits=ServeLimits(waiting=int(sys.argv[4])))
    open_service(app, assistant(Path(sys.argv[1]), wanted), Keyring([]), Store(sys.argv[2], 30))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
