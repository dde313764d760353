"""What is OpenVINO's own: the graph and what it refuses, the pages, and that nobody is told of it. tests/test_context_engine.py has the answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.convert import to_ctranslate2
from stages.files import write_json
from stages.serve.contexts import Entry
from stages.serve.engine import Sampling
from stages.serve.engine_ctranslate2 import CTranslate2Engine
from stages.serve.engine_openvino import OpenVinoEngine
from stages.serve.engine_transformers import TransformersEngine
from stages.serve.llama_graph import PAGE, Llama
from stages.serve.model_bin import tensors
from stages.serve.openvino import Pages, library
from stages.serve.scoring import log_softmax
from tests.engines import PROMPT, prompts, requests
from tests.models import tiny_llama

SETTINGS = EngineSettings(quantization="float32", threads=1, batch=4, context=512)


@pytest.fixture(scope="module")
def folder(hf: Path) -> Path:
    to_ctranslate2(hf, hf.parent / "engine", "float32")
    return hf.parent / "engine"


@pytest.fixture(scope="module")
def engine(folder: Path) -> OpenVinoEngine:
    return OpenVinoEngine(folder, SETTINGS)


# ------------------------------------------------------------ the graph


@pytest.mark.parametrize("quantization", ["float32", "int8"])
@pytest.mark.parametrize(
    ("more", "model_type"),
    [
        ({"attention_bias": True, "mlp_bias": True}, "llama"),
        ({"num_key_value_heads": 4, "tie_word_embeddings": False}, "llama"),
        ({}, "qwen2"),
        ({"head_dim": 16}, "qwen3"),
    ],
)
def test_models_of_this_type(tmp_path: Path, more: dict[str, int], model_type: str, quantization: str) -> None:
    """As of the reference, and in 8 bits as near to it as ctranslate2 is, or nearer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = tiny_llama(tmp_path / "hf", tied=True)
    given = AutoConfig.from_pretrained(hf).to_dict() | more | {"model_type": model_type}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    for name, values in model.named_parameters():
        if name.endswith(("bias", "_norm.weight")):
            torch.nn.init.normal_(values, mean=1.0)
    model.save_pretrained(hf)
    to_ctranslate2(hf, tmp_path / "engine", quantization)
    reference = TransformersEngine(hf, EngineSettings(kind="transformers", quantization="float32", threads=1))
    prompt = reference.chat.encode(PROMPT)
    wanted, far = reference.logprobs(prompt), []
    for engine in (OpenVinoEngine(tmp_path / "engine", SETTINGS), CTranslate2Engine(tmp_path / "engine", SETTINGS)):
        far.append(float(np.abs(engine.logprobs(prompt) - wanted).mean()))
    assert far[0] < (1e-4 if quantization == "float32" else 1.2 * far[1]), far


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decoder/activation": np.int8(0)}, r"decoder/activation is 0; for OpenVINO it must be 2"),
        ({"decoder/layer_1/self_attention/sliding_window": np.int32(64)}, r"sliding_window is 64; for OpenVINO it is not known"),
        ({"decoder/layer_1/self_attention/rotary_dim": np.int32(4)}, r"rotary_dim is 4; for OpenVINO it must be 0"),
        ({"decoder/num_heads": None}, r"model\.bin has no decoder/num_heads"),
        ({"decoder/layer_1/ffn/linear_1/weight": None}, r"model\.bin has no decoder/layer_1/ffn/linear_1/weight"),
        ({"decoder/layer_0/post_attention_layer_norm/gamma": np.ones(32, np.float32)}, r"model\.bin has decoder/layer_0/post_attention_layer_norm/gamma"),
        ({"decoder/layer_0/ffn/linear_0/weight": np.ones((64, 32), np.int16)}, r"linear_0/weight is of type int16; OpenVINO gets int8 or float32"),
    ],
)
def test_what_is_no_plain_llama_is_refused_by_name(folder: Path, change: dict[str, object], reason: str) -> None:
    given = {name: values for name, values in (tensors(folder / "model.bin") | change).items() if values is not None}
    given = {name: np.asarray(values) for name, values in given.items()}
    with pytest.raises(ModelError, match=reason):
        Llama(library(), given, 1e-5).write()


def test_a_damaged_file_is_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.bin").read_bytes()
    for at in (0, 3, 40, 4_000, len(whole) // 2, len(whole) - 3):
        (tmp_path / "model.bin").write_bytes(whole[:at])
        with pytest.raises(ModelError, match=r"model\.bin is (cut short or damaged|of another version)"):
            tensors(tmp_path / "model.bin")
    (tmp_path / "model.bin").write_bytes((7).to_bytes(4, "little") + whole[4:])
    with pytest.raises(ModelError, match="of another version than 6"):
        tensors(tmp_path / "model.bin")
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ModelError, match=r"config\.json: layer_norm_epsilon is None, and must be a number"):
        OpenVinoEngine(tmp_path, SETTINGS)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(ModelError, match=r"model\.bin is missing"):
        OpenVinoEngine(tmp_path, SETTINGS)


# ------------------------------------------------------------ pages


Step = tuple[str, int, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["encode", "share", "forget"]), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3 * PAGE)), min_size=1, max_size=20
)


@hypothesis(max_examples=25, deadline=None)
@given(steps=STEPS)
@example(steps=[("encode", 0, 0, 38), ("share", 1, 0, 36), ("encode", 1, 0, 4), ("encode", 0, 0, 9), ("encode", 1, 0, 3)])
@example(steps=[("encode", 0, 0, 38), ("share", 1, 0, 39), ("forget", 0, 0, 35), ("encode", 0, 0, 4), ("encode", 1, 0, 3)])
def test_whatever_is_shared_or_forgotten_each_sequence_reads_its_own_tokens(engine: OpenVinoEngine, steps: list[Step]) -> None:
    pages = Pages(engine._model, SETTINGS, 4)
    total, known = len(pages._free), [list[int]() for _ in range(4)]
    for number, (what, one, other, count) in enumerate(steps):
        if what == "encode":
            tokens = [3 + (number * 7 + i) % 50 for i in range(count % 40 + 1)]
            if sum(map(len, known)) + len(tokens) > SETTINGS.context // 2:
                continue
            known[one] += tokens
            at = len(known[one]) - len(tokens)
            (found,) = pages.encode([Entry(token, at + i, one, i == len(tokens) - 1) for i, token in enumerate(tokens)])
            assert np.abs(log_softmax(found) - engine.logprobs(known[one])[-1]).max() < 1e-3
        elif what == "share" and not known[one] and known[other] and one != other:
            known[one] = known[other][: min(count, len(known[other]))]
            pages.share(other, one, len(known[one]))
        elif what == "forget":
            known[one] = known[one][:count]
            pages.forget(one, count)
    held = {page for read in pages._sequences.values() for page in read.pages}
    assert len(pages._free) + len(held) == total and not held & set(pages._free), "a page is free or belongs to somebody"
    for sequence in range(4):
        pages.forget(sequence)
    assert sorted(pages._free) == list(range(total))


def test_the_bits_are_the_same_whatever_the_threads(hf: Path, engine: OpenVinoEngine) -> None:
    to_ctranslate2(hf, hf.parent / "int8", "int8")
    one, three = (OpenVinoEngine(hf.parent / "int8", EngineSettings(threads=threads, batch=4, context=512)) for threads in (1, 3))
    for prompt in prompts(engine):
        assert np.array_equal(one.logprobs(prompt), three.logprobs(prompt))
    assert one.score(requests(engine)) == three.score(requests(engine))
    assert one.generate(prompts(engine), Sampling(max_tokens=8)) == three.generate(prompts(engine), Sampling(max_tokens=8))


# ------------------------------------------------------------ privacy


def test_nobody_is_told_that_it_is_used(folder: Path, tmp_path: Path) -> None:
    """OpenVINO sends an event with each import, and keeps an id of its user in the home folder."""
    script = """import sys
from pathlib import Path
from conf.schema import EngineSettings
from stages.serve.engine import open_engine
open_engine(Path(sys.argv[1]), EngineSettings(quantization="float32"))
print(sorted(name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module))
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert not list(tmp_path.iterdir())
