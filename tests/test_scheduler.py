"""Batches that form by themselves, latecomers, cancelled answers and the bound of the queue, on an engine that takes nobody into a batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest

from conf.schema import EngineSettings
from stages.serve.admission import AIM, Full
from stages.serve.engine import Engine, Sampling, open_engine
from stages.serve.jobs import Job
from stages.serve.scheduler import Scheduler
from stages.serve.slots import NEAR, PATIENCE, Slots
from stages.serve.steering import Steering
from stages.serve.text import TextStream
from tests.served import endless, model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One whose answers go on and on."""
    folder = model(tmp_path_factory.mktemp("model"), "ctranslate2")
    return endless(open_engine(folder, EngineSettings(kind="ctranslate2", threads=2, batch=4), batches=True))


class Spied(Scheduler):
    """Keeps the batches that its slots ran."""

    def __init__(self, engine: Engine, pace: float = 0.0, **more: float) -> None:
        self.batches: list[list[Job]] = []
        self.gate = threading.Event()
        self.gate.set()
        spy = self

        class Watched(Slots):
            def _fitting(self, jobs: Sequence[Job]) -> int:
                self._pace = pace or self._pace
                return super()._fitting(jobs)

            def work(self, jobs: list[Job]) -> None:
                spy.gate.wait()
                spy.batches.append(list(jobs))
                super().work(jobs)

        with patch("stages.serve.scheduler.Slots", Watched):
            super().__init__(engine, **{"slots": 1, "batch": 4, "most_waiting": 16} | more)  # type: ignore[arg-type]


@pytest.fixture
def scheduler(engine: Engine) -> Iterator[Spied]:
    made = Spied(engine)
    yield made
    made.gate.set()
    made.close()


def job(engine: Engine, text: str = "where is my order", count: int = 8, seconds: float = 60, **more: object) -> Job:
    steering = more.pop("steering", None)
    over = threading.Event()
    made = Job(
        prompt=engine.chat.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"), sampling=Sampling(max_tokens=count, **more),  # type: ignore[arg-type]
        text=TextStream(engine.chat), on_text=lambda _: None, on_end=over.set, deadline=time.monotonic() + seconds, steering=steering,  # type: ignore[arg-type]
    )  # fmt: skip
    made.over = over  # type: ignore[attr-defined]
    return made


def wait(*jobs: Job) -> None:
    for one in jobs:
        assert one.over.wait(60), "an answer never ended"  # type: ignore[attr-defined]


def test_what_arrives_together_is_one_batch_and_the_engines_answer(engine: Engine, scheduler: Spied) -> None:
    jobs = [job(engine, text) for text in ("which size", "where is my order", "cancel my order", "status")]
    for one in jobs:
        scheduler.submit([one])
    wait(*jobs)
    assert [len(batch) for batch in scheduler.batches] == [4]
    assert [one.text.text for one in jobs] == [engine.generate([one.prompt], one.sampling)[0].text for one in jobs]
    assert all(one.arrived <= one.started <= one.first <= one.ended for one in jobs)  # type: ignore[operator]


def test_two_slots_share_what_waits(engine: Engine) -> None:
    made = Spied(engine, slots=2)
    made.gate.clear()
    jobs = [job(engine) for _ in range(4)]
    made.submit(jobs)
    time.sleep(0.1)
    made.gate.set()
    wait(*jobs)
    made.close()
    assert sorted(len(batch) for batch in made.batches) == [2, 2]


def test_a_batch_holds_so_many_tokens_and_one_answer_at_least(engine: Engine) -> None:
    size = len(job(engine, count=40).prompt) + 40
    made = Spied(engine, room=2 * size)
    made.gate.clear()
    jobs = [job(engine, count=40) for _ in range(5)]
    made.submit([*jobs, long := job(engine, count=400)])
    made.gate.set()
    wait(*jobs, long)
    made.close()
    assert {len(batch) for batch in made.batches if long not in batch} == {1, 2} and all(batch == [long] for batch in made.batches if long in batch)
    assert [len(one.tokens) for one in (*jobs, long)] == [40] * 5 + [400]


def test_a_batch_is_as_large_as_lets_a_latecomer_have_its_first_token_in_time(engine: Engine) -> None:
    size = len(job(engine).prompt)
    for fit in (1, 2, 3):
        made = Spied(engine, pace=AIM * 60 / (PATIENCE + 2) / (size * (fit + 0.5)), first_token=60)
        made.gate.clear()
        jobs = [job(engine, count=1) for _ in range(6)]
        made.submit(jobs)
        made.gate.set()
        wait(*jobs)
        made.close()
        assert [len(batch) for batch in made.batches] == [fit] * (6 // fit)


def test_a_batch_holds_who_waited_longest_and_answers_of_its_length(engine: Engine) -> None:
    made = Spied(engine, batch=8)
    made.gate.clear()
    texts = ["where", "where " * (NEAR + 4), "where is", "where " * 2, "where " * (NEAR + 3), "where " * (NEAR + 4)]
    first, longer, near, nearest, *_ = jobs = [job(engine, text, count=1) for text in texts]
    blocking = job(engine, count=1)
    made.submit([blocking])
    while made.waiting:
        time.sleep(0.001)
    made.submit(jobs)
    made.gate.set()
    wait(blocking, *jobs)
    made.close()
    assert len(longer.prompt) - len(first.prompt) > NEAR >= max(len(near.prompt), len(nearest.prompt)) - len(first.prompt)
    assert [[jobs.index(one) for one in batch] for batch in made.batches[1:]] == [[0, *sorted((2, 3), key=lambda i: len(jobs[i].prompt))], [1, 5, 4]]


def test_a_latecomer_does_not_wait_for_a_long_batch_to_end(engine: Engine, scheduler: Spied) -> None:
    long = [job(engine, text, 400) for text in ("which size", "status")]
    scheduler.submit(long)
    while not all(one.first for one in long):
        time.sleep(0.001)
    late = job(engine, "cancel my order", 4)
    scheduler.submit([late])
    wait(late)
    assert all(one.reason is None for one in long), "it waited for the end"
    wait(*long)
    assert scheduler.batches[0] == long and scheduler.batches[1] == [late], "the others have grown too long for its batch"
    assert scheduler.batches[2] == long, "they go on together"
    assert [len(one.tokens) for one in long] == [400, 400]
    assert late.text.text == engine.generate([late.prompt], late.sampling)[0].text


def test_a_full_batch_takes_turns_with_who_waits(engine: Engine, scheduler: Spied) -> None:
    long = [job(engine, "which size", 400) for _ in range(4)]
    scheduler.submit(long)
    while not all(one.first for one in long):
        time.sleep(0.001)
    others = [job(engine, "status", 3), job(engine, "status", 3, temperature=1.0), job(engine, "status", 3, temperature=1.0)]
    scheduler.submit(others)
    wait(*others)
    assert all(one.reason is None for one in long)
    assert all(len({one.key() for one in batch}) == 1 and len(batch) <= 4 for batch in scheduler.batches)
    wait(*long)


def test_a_cancelled_answer_frees_its_place(engine: Engine, scheduler: Spied) -> None:
    endless = [job(engine, "which size", 100_000), job(engine, "status", 100_000)]
    scheduler.submit(endless)
    while not all(one.first for one in endless):
        time.sleep(0.001)
    endless[0].cancelled = True
    wait(endless[0])
    assert endless[0].reason == "cancelled" and endless[1].reason is None
    endless[1].cancelled = True
    wait(endless[1])
    assert endless[1].ended - endless[1].arrived < 30  # type: ignore[operator]


def test_an_answer_that_takes_too_long_is_given_up_running_or_waiting(engine: Engine, scheduler: Spied) -> None:
    running, waiting = job(engine, "which size", 100_000, seconds=0.3), job(engine, "which size", 4, seconds=0.1, temperature=1.0)
    scheduler.gate.clear()
    scheduler.submit([running])
    time.sleep(0.05)
    scheduler.submit([waiting])
    time.sleep(0.1)
    scheduler.gate.set()
    wait(running, waiting)
    assert running.reason == waiting.reason == "timeout" and waiting.started is None


def test_a_seeded_answer_is_alone_and_lets_others_in(engine: Engine, scheduler: Spied) -> None:
    def seeded() -> Job:
        sampling = Sampling(max_tokens=40, temperature=1.0)
        return job(engine, count=40, temperature=1.0, steering=Steering(sampling=sampling, seed=7))

    alone = seeded()
    scheduler.submit([alone])
    wait(alone)
    crowd = [seeded(), job(engine, "which size", 30), job(engine, "status", 30, temperature=1.0), seeded()]
    scheduler.submit(crowd)
    wait(*crowd)
    assert crowd[0].tokens == crowd[3].tokens == alone.tokens
    turns = [at for at, batch in enumerate(scheduler.batches) if crowd[0] in batch]
    assert len(turns) > 2 and all(scheduler.batches[at] == [crowd[0]] for at in turns)
    assert any(crowd[1] in batch for batch in scheduler.batches[turns[0] : turns[-1]]), "a turn is one draft long"


def test_the_queue_is_bounded_and_takes_all_or_none(engine: Engine) -> None:
    made = Spied(engine, most_waiting=3)
    made.gate.clear()
    running = job(engine)
    made.submit([running])
    while made.waiting:
        time.sleep(0.001)
    jobs = [job(engine) for _ in range(3)]
    made.submit(jobs[:2])
    with pytest.raises(Full):
        made.submit([job(engine), job(engine)])
    made.submit(jobs[2:])
    with pytest.raises(Full):
        made.submit([job(engine)])
    made.gate.set()
    wait(running, *jobs)
    made.close()
    with pytest.raises(Full):
        made.submit([job(engine)])


def test_a_failure_of_the_engine_ends_its_answers_and_not_the_slot(engine: Engine, scheduler: Spied) -> None:
    broken = job(engine)
    broken.prompt = [10**6]
    scheduler.submit([broken])
    wait(broken)
    assert broken.reason == "failed" and not broken.error, "what the client is told is no matter of the engine's"
    fine = job(engine)
    scheduler.submit([fine])
    wait(fine)
    assert fine.reason == "length"


def test_closing_ends_what_runs_and_what_waits(engine: Engine, tmp_path: Path) -> None:
    made = Spied(engine)
    jobs = [job(engine, "which size", 100_000), job(engine, "which size", 100_000, temperature=1.0)]
    made.submit(jobs)
    while not jobs[0].first:
        time.sleep(0.001)
    made.close()
    assert {one.reason for one in jobs} == {"cancelled"}


def test_who_cannot_take_an_answer_fails_it_alone(engine: Engine, scheduler: Spied) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("the reader is gone")

    failing, fine = job(engine), job(engine)
    failing.on_text = broken
    scheduler.submit([failing, fine])
    wait(failing)
    wait(fine)
    assert (failing.reason, fine.reason) == ("failed", "length")
