"""The engines whose batch answers join, OpenVINO and llama.cpp, against the reference, and that batch, on a small random Llama."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.converters import CONVERT
from stages.serve.assistant import Assistant
from stages.serve.context_engine import ContextEngine
from stages.serve.engine import Sampling, open_engine
from stages.serve.engine_transformers import TransformersEngine
from stages.serve.guard.guard import Guard
from stages.serve.live_batch import CHUNK, LiveBatch, common
from stages.serve.refusals import Refused
from stages.serve.scheduler import Scheduler
from stages.serve.scoring import log_softmax
from stages.serve.steering import Steering
from stages.serve.wire import ChatRequest
from tests.engines import PROMPT, decoded_in_part, prompts, requests
from tests.served import LLAMACPP, endless, settings
from tests.test_scheduler import job, wait

TYPES = {"openvino": {"float32": 0.0, "int8": 0.25}, "llamacpp": {"float32": 0.0, "bfloat16": 0.1, "q8_0": 0.25}}
"""Engine -> type -> by how much its log-probabilities may differ from the reference's in the mean."""
FILE = {"openvino": "model.bin", "llamacpp": "model.gguf"}


def opened(folder: Path, quantization: str = "float32", **more: int) -> ContextEngine:
    settings = {"threads": 1, "batch": 4, "context": 1024} | more
    kind = "openvino" if (folder / FILE["openvino"]).exists() else "llamacpp"
    return open_engine(folder, EngineSettings(kind=kind, quantization=quantization, **settings))


@pytest.fixture(scope="module", params=["openvino", pytest.param("llamacpp", marks=LLAMACPP)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(hf: Path, kind: str) -> Path:
    """In float32; the other types lie beside it."""
    for quantization in TYPES[kind]:
        CONVERT[kind](hf, hf.parent / kind / quantization, quantization)
    return hf.parent / kind / "float32"


@pytest.fixture(scope="module")
def engine(folder: Path) -> ContextEngine:
    return opened(folder)


# ------------------------------------------------------------ against the reference


def test_log_probabilities_and_scores_equal_the_reference(engine: ContextEngine, reference: TransformersEngine) -> None:
    prompt, asked = engine.chat.encode(PROMPT), requests(engine)
    ours, theirs = engine.logprobs(prompt), reference.logprobs(prompt)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-3
    for mine, others in zip(engine.score(asked), reference.score(asked), strict=True):
        assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in others], abs=1e-3)
        assert [s.greedy for s in mine] == [s.greedy for s in others]


def test_answers_equal_the_reference(engine: ContextEngine, reference: TransformersEngine) -> None:
    asked = prompts(engine)
    for sampling in (Sampling(max_tokens=12), Sampling(max_tokens=12, stop=("e",)), Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=3)):
        assert engine.generate(asked, sampling) == reference.generate(asked, sampling), sampling
    assert engine.generate([], Sampling(max_tokens=1)) == []
    tokens, logits = engine.draft(asked[1], 4)
    assert tokens == engine.generate([asked[1]], Sampling(max_tokens=4))[0].tokens
    for at, row in enumerate(logits):
        assert np.abs(log_softmax(row) - reference.logprobs([*asked[1], *tokens[:at]])[-1]).max() < 1e-3


def test_short_types_are_close_and_repeatable(folder: Path, kind: str, reference: TransformersEngine) -> None:
    for quantization, mean in TYPES[kind].items():
        if quantization == "float32":
            continue
        engine = opened(folder.parent / quantization, quantization)
        prompt, asked = engine.chat.encode(PROMPT), requests(engine)
        ours, theirs = engine.logprobs(prompt), reference.logprobs(prompt)
        assert 0 < np.abs(ours - theirs).mean() < mean and (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.8
        assert engine.score(asked) == engine.score(asked)
        assert engine.generate(prompts(engine), Sampling(max_tokens=8)) == engine.generate(prompts(engine), Sampling(max_tokens=8))


def test_each_prompt_ends_by_itself_with_or_without_a_kept_prefix(engine: ContextEngine) -> None:
    asked = prompts(engine)
    whole = [answer.tokens for answer in engine.generate(asked, Sampling(max_tokens=12))]
    for kept in ([], asked[0][:3], engine.chat.encode("<|im_start|>user\n")):
        engine.keep(kept)
        assert decoded_in_part(engine, asked) == [tokens[: i + 2] for i, tokens in enumerate(whole)], kept
    engine.keep([])


def test_what_cannot_be_asked_is_refused(engine: ContextEngine, folder: Path, kind: str, tmp_path: Path) -> None:
    for call in (lambda: engine.logprobs([10**6]), lambda: engine.generate([[10**6]], Sampling(max_tokens=1)), lambda: engine.score([([1], [[-1]])])):
        with pytest.raises(ModelError, match="outside the model's vocabulary of 320"):
            call()
    with pytest.raises(ModelError, match="empty context"):
        engine.score([([], [[1]])])
    with pytest.raises(ModelError, match="empty prompt"):
        engine.generate([[]], Sampling(max_tokens=1))
    with pytest.raises(ModelError, match=r"5 tokens and an answer of 1020 do not fit into serve\.engine\.context=1024"):
        engine.generate([[1] * 5], Sampling(max_tokens=1020))
    with pytest.raises(ModelError, match=rf"{re.escape(FILE[kind])} is missing"):
        open_engine(tmp_path, EngineSettings(kind=kind, quantization="float32"))
    shutil.copytree(folder, damaged := tmp_path / "damaged")
    (damaged / FILE[kind]).write_bytes((folder / FILE[kind]).read_bytes()[:20_000])
    with pytest.raises(ModelError, match=rf"{re.escape(FILE[kind])} (does not load|is cut short or damaged)"):
        opened(damaged)


# ------------------------------------------------------------ what is encoded


def test_a_context_is_encoded_once_for_all_continuations_and_its_beginning_for_the_next_one(engine: ContextEngine) -> None:
    first, second = [5] * 40 + [6], [5] * 40 + [7, 8]
    before = engine._context.encoded
    engine.score([(first, [[9, 10], [11]]), (second, [[12]])])
    assert engine._context.encoded - before == 40 + (2 + 1) + 1 + 1, "40 of the contexts, one row a token of a continuation, and what differs"


def test_a_prefix_is_encoded_once_whoever_has_it(engine: ContextEngine) -> None:
    engine.keep(kept := [5, 6, 7, 8] * 5)
    batch = engine.live()
    assert batch.context.encoded == len(kept)
    one = batch.join([*kept, 9, 10, 11], 4)
    batch.step()
    assert batch.context.encoded == len(kept) + 3
    same = [*kept, *[20] * 30, 21]
    batch.join(same, 4), batch.join(same, 4)
    found = batch.step()
    assert len(found) == 1 and batch.context.encoded == len(kept) + 3 + 31, "the second of two alike waits for the first"
    found = batch.step()
    assert len(found) == 1 and batch.context.encoded == len(kept) + 3 + 31 + 1, "and then encodes its last token alone"
    assert one is not None
    engine.keep([])


def test_there_is_room_for_so_many_and_who_leaves_makes_some(folder: Path) -> None:
    batch = opened(folder, context=256, batch=3).live()
    first, second = batch.join([5] * 20, 100), batch.join([6] * 20, 100)
    assert first is not None and second is not None and batch.join([7] * 20, 100) is None, "no cells"
    third = batch.join([7] * 6, 10)
    assert third is not None and batch.join([8], 1) is None, "no place"
    batch.step()
    batch.leave(first)
    assert batch.join([7] * 20, 100) is not None
    assert len(batch.step()) == 1, "only the new one: nobody pushed"


def test_a_long_prompt_comes_in_parts_and_the_others_go_on(engine: ContextEngine) -> None:
    batch = engine.live()
    short, long = batch.join([5, 6], 8), batch.join([7] * (2 * CHUNK), 8)
    steps = []
    while long not in (found := batch.step()):
        steps.append(set(found))
        batch.push(short, 5)  # type: ignore[arg-type]
    assert steps == [{short}] * 2


@hypothesis(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(3, 60), min_size=1, max_size=30), st.integers(1, 6)), min_size=1, max_size=7))
def test_an_answer_is_the_same_whenever_it_joins(engine: ContextEngine, plan: list[tuple[int, list[int], int]]) -> None:
    """Each of a plan: the step from which it wants to join, its prompt, the length of its answer."""
    batch, waiting = LiveBatch(engine._cleared(), 3), sorted(range(len(plan)), key=lambda i: plan[i][0])
    answers: dict[int, list[int]] = {i: [] for i in waiting}
    working: dict[int, int] = {}
    step = 0
    while waiting or working:
        while waiting and plan[waiting[0]][0] <= step and (place := batch.join(plan[waiting[0]][1], plan[waiting[0]][2])) is not None:
            working[place] = waiting.pop(0)
        for place, logits in batch.step().items():
            answers[working[place]].append(int(logits.argmax()))
            if len(answers[working[place]]) == plan[working[place]][2]:
                batch.leave(place)
                del working[place]
            else:
                batch.push(place, answers[working[place]][-1])
        step += 1
    for i, (_, prompt, length) in enumerate(plan):
        assert answers[i] == engine.draft(prompt, length)[0] or engine.chat.eos_ids.intersection(answers[i])


# ------------------------------------------------------------ under the scheduler


def test_a_request_that_does_not_fit_beside_the_kept_prefix_is_refused_by_name(folder: Path, kind: str) -> None:
    """It brings a system prompt of its own, and so shares little with the prefix."""
    asked = ChatRequest.model_validate({"model": "x", "messages": [{"role": "system", "content": "Sing."}, {"role": "user", "content": "where is it"}]})

    def served(context: int) -> Assistant:
        wanted = settings(kind, system="Be brief and friendly, and never promise what nobody keeps. " * 4, max_tokens=20)
        wanted = replace(wanted, engine=replace(wanted.engine, quantization="float32", context=context))
        return Assistant(name="x", digest="d", engine=open_engine(folder, wanted.engine), guard=Guard(None, wanted.guard), settings=wanted)

    def encode(assistant: Assistant) -> int | None:
        assistant.engine.keep(assistant.kept())
        batch = assistant.engine.live()
        assert batch is not None
        return batch.join(prompt, 20)

    (prompt,) = served(4096).prompts(asked, ["Sing.", "where is it"])
    kept = served(4096).kept()
    needs = len(prompt) + 20 + len(kept) - common(kept, prompt)
    assert needs > len(prompt) + 20
    fits, short = served(needs), served(needs - 1)
    assert fits.prompts(asked, ["Sing.", "where is it"]) == [prompt] and encode(fits) is not None
    with pytest.raises(ModelError, match="do not fit"):
        encode(short)
    with pytest.raises(Refused, match=f"messages has {len(prompt)} tokens, and its answer up to 20; the limit of both is {len(prompt) + 19}"):
        short.prompts(asked, ["Sing.", "where is it"])


@pytest.fixture
def going(folder: Path) -> Iterator[ContextEngine]:
    """One whose answers go on and on."""
    yield endless(opened(folder, batch=2, context=2048))


@pytest.fixture
def scheduler(going: ContextEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    made: list[LiveBatch] = []
    live = going.live
    monkeypatch.setattr(going, "live", lambda: made.append(live()) or made[-1])
    running = Scheduler(going, slots=1, batch=4, most_waiting=3)
    running.batch = made[0]  # type: ignore[attr-defined]
    step = made[0].step
    monkeypatch.setattr(made[0], "step", lambda: time.sleep(0.001) or step())  # so that an answer goes on while the test looks
    yield running
    running.close()


def started(*jobs: object) -> None:
    while not all(one.first for one in jobs):  # type: ignore[attr-defined]
        time.sleep(0.001)


def test_a_latecomer_joins_the_running_batch_and_nothing_is_encoded_again(going: ContextEngine, scheduler: Scheduler) -> None:
    long = job(going, "which size", 600)
    scheduler.submit([long])
    started(long)
    late = job(going, "cancel my order", 4)
    scheduler.submit([late])
    wait(late)
    assert long.reason is None, "it waited for the end"
    wait(long)
    asked = len(long.prompt) + len(late.prompt) - 3  # both begin with the same tokens, of which the second takes at least three over
    assert scheduler.batch.context.encoded <= asked + 599 + 3  # type: ignore[attr-defined]
    for one in (late, long):
        assert one.tokens == going.generate([one.prompt], one.sampling)[0].tokens


def test_a_cancelled_answer_frees_its_place_and_a_late_one_is_given_up(going: ContextEngine, scheduler: Scheduler) -> None:
    long = [job(going, "which size", 900), job(going, "status", 900)]
    scheduler.submit(long)
    started(*long)
    third, hopeless = job(going, "cancel my order", 4), job(going, "status", 4, seconds=0.05)
    scheduler.submit([third, hopeless])
    wait(hopeless)
    assert third.started is None and hopeless.reason == "timeout", "both places are taken"
    long[0].cancelled = True
    wait(long[0], third)
    assert long[0].reason == "cancelled" and third.reason == "length" and long[1].reason is None
    long[1].cancelled = True
    wait(long[1])


def test_steered_answers_ride_along(going: ContextEngine, scheduler: Scheduler) -> None:
    def seeded() -> object:
        sampling = Sampling(max_tokens=20, temperature=1.0)
        return job(going, count=20, temperature=1.0, steering=Steering(sampling=sampling, seed=7, top=2))

    alone = seeded()
    scheduler.submit([alone])  # type: ignore[list-item]
    wait(alone)  # type: ignore[arg-type]
    greedy, again = job(going, "which size", 100), seeded()
    scheduler.submit([greedy, again])  # type: ignore[list-item]
    wait(again)  # type: ignore[arg-type]
    assert greedy.reason is None, "it had to wait for the other's end"
    assert again.tokens == alone.tokens and len(again.logprobs) == 20  # type: ignore[attr-defined]
    wait(greedy)


def test_a_broken_prompt_fails_alone(going: ContextEngine, scheduler: Scheduler) -> None:
    fine, broken = job(going, "which size", 50), job(going)
    broken.prompt = [10**6]
    scheduler.submit([fine, broken])
    wait(fine, broken)
    assert broken.reason == "failed" and "vocabulary" in broken.error and fine.reason == "length"


def test_closing_ends_what_runs_and_what_waits(going: ContextEngine, scheduler: Scheduler) -> None:
    jobs = [job(going, "which size", 900) for _ in range(3)]
    scheduler.submit(jobs)
    started(*jobs[:2])
    scheduler.close()
    assert {one.reason for one in jobs} == {"cancelled"}


def test_a_process_ends_in_peace(folder: Path, kind: str) -> None:
    """With an answer at work when Python ends."""
    script = """import sys, pathlib, threading, time
from conf.schema import EngineSettings
from stages.serve.assistant import Assistant
from stages.serve.engine import Sampling, open_engine
from stages.serve.jobs import Job
from stages.serve.scheduler import Scheduler
from stages.serve.text import TextStream
engine = open_engine(pathlib.Path(sys.argv[1]), EngineSettings(kind=sys.argv[2], quantization="float32", threads=2))
engine.score([([5, 6] * 30, [[7, 8, 9]] * 8)])
engine.chat.eos_ids = set()
begun = threading.Event()
Scheduler(engine, slots=1, batch=4, most_waiting=8).submit([Job(prompt=[5, 6], sampling=Sampling(max_tokens=5000), text=TextStream(engine.chat),
    on_text=lambda _: begun.set(), on_end=begun.set, deadline=time.monotonic() + 60)])
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder), kind], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
