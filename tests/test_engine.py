"""The engines against each other, on a small random Llama: the reference decides."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import pytest

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.convert import to_ctranslate2
from stages.convert_gguf import to_gguf
from stages.serve.chat import Chat
from stages.serve.engine import Engine, Sampling, open_engine
from stages.serve.engine_ctranslate2 import CTranslate2Engine, common_prefix
from stages.serve.engine_transformers import TransformersEngine
from stages.serve.scoring import forced_is_cheaper, log_softmax
from stages.serve.text import TextStream, _begun, cut
from tests.engines import PROMPT, decoded_in_part, prompts, requests


@pytest.fixture(scope="module")
def engine(hf: Path) -> CTranslate2Engine:
    to_ctranslate2(hf, hf.parent / "ct2", "float32")
    return CTranslate2Engine(hf.parent / "ct2", EngineSettings(quantization="float32", threads=1, batch=4))


def test_both_ways_of_scoring_are_taken() -> None:
    assert forced_is_cheaper(60, [3] * 12)
    assert not forced_is_cheaper(20, [23, 24])
    assert not forced_is_cheaper(60, [3])
    assert not forced_is_cheaper(60, [])


def test_scores_equal_the_reference(engine: CTranslate2Engine, reference: TransformersEngine) -> None:
    asked = requests(engine)
    for ours, theirs, (_, continuations) in zip(engine.score(asked), reference.score(asked), asked, strict=True):
        assert len(ours) == len(theirs) == len(continuations)
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert a.greedy == b.greedy


def test_shared_prefix_scores_equal_whole_ones(engine: CTranslate2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(engine)
    for choice in (True, False):
        monkeypatch.setattr("stages.serve.scoring.forced_is_cheaper", lambda _, lengths, choice=choice: bool(lengths) and choice)
        scores = engine.score(asked)
        for (context, continuations), row in zip(asked, scores, strict=True):
            for continuation, score in zip(continuations, row, strict=True):
                after = engine.logprobs([*context, *continuation])[len(context) - 1 : -1] if continuation else []
                assert score.logprob == pytest.approx(sum(float(r[t]) for r, t in zip(after, continuation, strict=True)), abs=1e-3)


def test_the_greedy_answer_is_scored_greedy(engine: CTranslate2Engine) -> None:
    prompt = engine.chat.encode(PROMPT)
    answer = engine.generate([prompt], Sampling(max_tokens=6))[0].tokens
    other = [*answer[:-1], (answer[-1] + 1) % 100]
    assert [s.greedy for s in engine.score([(prompt, [answer, other])])[0]] == [True, False]


def test_logprobs_equal_the_reference(engine: CTranslate2Engine, reference: TransformersEngine) -> None:
    prompt = engine.chat.encode(PROMPT)
    ours, theirs = engine.logprobs(prompt), reference.logprobs(prompt)
    assert ours.shape == theirs.shape == (len(prompt), engine.vocabulary)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.allclose(np.exp(ours).sum(axis=-1), 1, atol=1e-4)


def test_answers_equal_the_reference(engine: CTranslate2Engine, reference: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=12)
    ours = engine.generate(prompts(engine), sampling)
    assert ours == reference.generate(prompts(engine), sampling)
    assert ours[0] == ours[-1] and len({a.text for a in ours}) > 2
    assert ours == [engine.generate([p], sampling)[0] for p in prompts(engine)], "an answer depends on its batch"
    assert engine.generate([], sampling) == []


def test_the_end_token_ends_and_max_tokens_cuts(engine: CTranslate2Engine) -> None:
    prompt = prompts(engine)[1]
    whole = engine.generate([prompt], Sampling(max_tokens=12))[0]
    assert whole.finish_reason == "length" and len(whole.tokens) == 12
    engine._ends, engine.chat.eos_ids, kept = [whole.tokens[3]], {whole.tokens[3]}, (engine._ends, engine.chat.eos_ids)
    try:
        ended = engine.generate([prompt], Sampling(max_tokens=12))[0]
    finally:
        engine._ends, engine.chat.eos_ids = kept
    assert ended.finish_reason == "stop" and ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[3])]


def test_stop_texts_are_not_part_of_the_answer(engine: CTranslate2Engine, reference: TransformersEngine) -> None:
    prompt = prompts(engine)[1]
    whole = engine.generate([prompt], Sampling(max_tokens=12))[0]
    stop = whole.text[5:8]
    sampling = Sampling(max_tokens=12, stop=("never there", stop))
    ours = engine.generate([prompt, prompts(engine)[0]], sampling)[0]
    assert ours.finish_reason == "stop" and ours.text == whole.text[: whole.text.index(stop)]
    assert len(ours.tokens) < 12, "generation went on after the stop text"
    assert reference.generate([prompt], sampling)[0] == ours


def test_decoding_tells_every_token_and_ends_each_prompt_by_itself(engine: CTranslate2Engine, reference: TransformersEngine) -> None:
    asked = prompts(engine)
    whole = [answer.tokens for answer in engine.generate(asked, Sampling(max_tokens=12))]
    for who, kept in ((engine, []), (engine, asked[0][:3]), (engine, engine.chat.encode("<|im_start|>user\n")), (reference, [])):
        who.keep(kept)
        assert decoded_in_part(who, asked) == [tokens[: i + 2] for i, tokens in enumerate(whole)], kept
    engine.keep([])


def test_a_draft_is_the_greedy_answer_with_its_logits(engine: CTranslate2Engine, reference: TransformersEngine) -> None:
    prompt = prompts(engine)[1]
    tokens, logits = engine.draft(prompt, 4)
    expected = engine.generate([prompt], Sampling(max_tokens=4))[0].tokens
    assert tokens == expected and logits.shape == (4, engine.vocabulary)
    assert reference.draft(prompt, 4)[0] == expected[:1]
    for at, row in enumerate(logits):
        assert np.abs(log_softmax(row) - reference.logprobs([*prompt, *expected[:at]])[-1]).max() < 1e-3


@pytest.mark.parametrize("left_open", [True, False])
def test_a_process_ends_in_peace(engine: CTranslate2Engine, left_open: bool) -> None:
    """ctranslate2's threads abort the process if they are still at work, or still there, when Python ends."""
    script = """import sys, pathlib
from conf.schema import EngineSettings
from stages.serve.engine import Sampling, open_engine
engine = open_engine(pathlib.Path(sys.argv[1]), EngineSettings(threads=1))
engine.score([([5, 6] * 30, [[7, 8, 9]] * 8)])
engine.generate([[5, 6]], Sampling(max_tokens=4, stop=("never",)))
from stages.serve.jobs import Job
from stages.serve.scheduler import Scheduler
from stages.serve.text import TextStream
import threading, time
started = threading.Event()
scheduler = Scheduler(engine, slots=1, batch=4, most_waiting=8)
sampling = Sampling(max_tokens=int(sys.argv[2]))
scheduler.submit([Job(prompt=[5, 6], sampling=sampling, text=TextStream(engine.chat), on_text=lambda _: started.set(), on_end=started.set, deadline=time.monotonic() + 60)])
started.wait()
"""
    command = [sys.executable, "-c", script, str(engine.chat.folder), "5000" if left_open else "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_models_own_thread_may_be_the_one_that_lets_go_of_it(engine: CTranslate2Engine) -> None:
    """It cannot join itself: the process would abort there, or at its end if nobody waited for the thread that joins it instead."""
    script = """import sys, pathlib, threading
from conf.schema import EngineSettings
from stages.serve.engine_ctranslate2 import CTranslate2Engine, release
engine = CTranslate2Engine(pathlib.Path(sys.argv[1]), EngineSettings(quantization="float32", threads=1))
held, daemons = engine._held, []
def on_token(_):
    if held:
        release(held)
        daemons.extend(thread.daemon for thread in threading.enumerate() if thread.name == "release")
    return False
held[0].generate_batch([["a", "b"]], asynchronous=True, max_length=50, callback=on_token)[0].result()
print(held, daemons)
"""
    done = subprocess.run([sys.executable, "-c", script, str(engine.chat.folder)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] [False]\n", "")


def test_a_seeded_sample_depends_on_the_seed_alone(engine: CTranslate2Engine, reference: TransformersEngine) -> None:
    prompt = prompts(engine)[1]

    def sample(who: Engine, seed: int | None, temperature: float = 1.0, top_p: float = 1.0) -> str:
        return who.generate([prompt], Sampling(max_tokens=10, temperature=temperature, top_p=top_p, seed=seed))[0].text

    first = sample(engine, 1)
    sample(engine, None)
    assert first == sample(engine, 1) == sample(reference, 1)
    assert len({sample(engine, seed) for seed in range(5)}) == 5
    assert sample(engine, None) != sample(engine, None)
    assert sample(engine, 3, top_p=1e-6) == engine.generate([prompt], Sampling(max_tokens=10))[0].text, "a tiny nucleus is the most likely token"


def test_int8_is_close_and_repeatable(hf: Path, reference: TransformersEngine) -> None:
    to_ctranslate2(hf, hf.parent / "int8", "int8")
    engine = open_engine(hf.parent / "int8", EngineSettings(threads=1, batch=4))
    prompt = prompts(engine)[1]
    ours, theirs = engine.logprobs(prompt), reference.logprobs(prompt)
    assert 0 < np.abs(ours - theirs).mean() < 0.2 and (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.8
    asked = requests(engine)
    assert engine.score(asked) == engine.score(asked)
    assert engine.generate(prompts(engine), Sampling(max_tokens=8)) == engine.generate(prompts(engine), Sampling(max_tokens=8))


@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_batches_side_by_side_give_the_same_bits(hf: Path, quantization: str) -> None:
    out = hf.parent / f"side-{quantization}"
    to_ctranslate2(hf, out, quantization)
    alone, wide = (CTranslate2Engine(out, EngineSettings(quantization=quantization, threads=threads, batch=2), True) for threads in (1, 3))  # type: ignore[arg-type]
    served = CTranslate2Engine(out, EngineSettings(quantization=quantization, threads=2, batch=2))  # type: ignore[arg-type]
    for sampling in (Sampling(max_tokens=12), Sampling(max_tokens=12, stop=("e",)), Sampling(max_tokens=6, temperature=1.0, seed=3)):
        answers = wide.generate(prompts(wide) * 3, sampling)
        assert answers == alone.generate(prompts(alone) * 3, sampling) == served.generate(prompts(served) * 3, sampling)
    asked = requests(wide) * 3
    assert wide.score(asked) == alone.score(asked) == served.score(asked)


@pytest.mark.parametrize(
    ("tokens", "shared"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1], [1, 2]], 0), ([[1, 2, 3]], 2), ([[2, 1], [1, 2], [1, 3]], 0)]
)
def test_common_prefix_leaves_a_token_to_each(tokens: Sequence[Sequence[int]], shared: int) -> None:
    assert common_prefix(tokens) == shared


def test_text_stream_holds_back_what_may_change(engine: CTranslate2Engine) -> None:
    ids = engine.chat.encode("naïve €5 STOP no")
    stream = TextStream(engine.chat, ("STOP",))
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == "naïve €5 " and not any("\ufffd" in p or "S" in p for p in pieces) and stream.stopped
    assert cut("abcd", ("d", "bc")) == ("a", True)


@pytest.mark.parametrize(("said", "stop", "answer"), [("hi\n→x", "\n→", "hi"), ("okEND✓", "END✓", "ok"), ("a🎉🎉b", "🎉🎉", "a"), ("a🎉 b", "🎉🎉", "a🎉 b")])
def test_nothing_of_a_stop_text_comes_out_when_a_character_of_it_is_several_tokens(hf: Path, said: str, stop: str, answer: str) -> None:
    chat = Chat(hf)
    stream = TextStream(chat, (stop,))
    assert "".join([*(stream.push(i) for i in chat.encode(said)), stream.finish()]) == stream.text == answer
    assert chat.decode(stream.tokens[: stream.made_of(len(answer))]) == answer
    assert stream.made_of(0) == 0


def test_what_a_long_stop_text_costs_grows_with_the_answer_and_not_with_it() -> None:
    class Sliced(str):
        """Counts what is cut off it."""

        def __getitem__(self, at: SupportsIndex | slice) -> str:
            taken.append(part := super().__getitem__(at))
            return part

    taken: list[str] = []
    assert _begun("so am", [Sliced("amen" * 100_000)]) == 2
    assert sum(map(len, taken)) < 100


def test_errors_name_the_file(tmp_path: Path, hf: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.bin is missing"):
        open_engine(tmp_path, EngineSettings())
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        open_engine(tmp_path, EngineSettings(kind="transformers", quantization="float32"))
    with pytest.raises(ModelError, match="quantization=int8"):
        open_engine(hf, EngineSettings(kind="transformers"))
    for name in ("config.json", "vocabulary.json", "model.bin"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes((hf / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="does not load"):
        open_engine(tmp_path, EngineSettings(kind="ctranslate2"))


def test_a_foreign_token_is_refused(engine: CTranslate2Engine) -> None:
    for call in (lambda: engine.logprobs([10**6]), lambda: engine.generate([[10**6]], Sampling(max_tokens=1)), lambda: engine.score([([1], [[10**6]])])):
        with pytest.raises(ModelError, match="vocabulary"):
            call()
    with pytest.raises(ModelError, match="empty context"):
        engine.score([([], [[1]])])
    with pytest.raises(ModelError, match="empty prompt"):
        engine.generate([[], [1]], Sampling(max_tokens=1))


VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(VLLM, reason="vllm is installed")
def test_without_vllm_the_error_says_what_to_do(hf: Path) -> None:
    with pytest.raises(ModelError, match="vllm is not installed"):
        open_engine(hf, EngineSettings(kind="vllm", quantization="float32"))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_without_llama_cpp_the_error_says_what_to_do(hf: Path) -> None:
    to_gguf(hf, hf.parent / "gguf", "float32")
    with pytest.raises(ModelError, match="llama-cpp-python is not installed") as caught:
        open_engine(hf.parent / "gguf", EngineSettings(kind="llamacpp", quantization="float32"))
    assert "pip install -e '.[llamacpp]'" in caught.value.remedy


@pytest.mark.gpu
@pytest.mark.skipif(not VLLM, reason="vllm is not installed")
def test_vllm_equals_the_reference(hf: Path, reference: TransformersEngine) -> None:
    vllm = open_engine(hf, EngineSettings(kind="vllm", quantization="float32"))
    assert [a.text for a in vllm.generate(prompts(vllm), Sampling(max_tokens=8))] == [a.text for a in reference.generate(prompts(vllm), Sampling(max_tokens=8))]
    asked = [(context, [c for c in continuations if c]) for context, continuations in requests(vllm)]
    for ours, theirs in zip(vllm.score(asked), reference.score(asked), strict=True):
        assert [s.logprob for s in ours] == pytest.approx([s.logprob for s in theirs], abs=1e-2)
    prompt = prompts(vllm)[1]
    assert np.abs(vllm.logprobs(prompt) - reference.logprobs(prompt)).max() < 1e-2
