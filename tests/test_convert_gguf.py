"""The GGUF file that llama.cpp runs: its numbers, its bytes, and what it refuses. Read back by gguf's own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ModelError
from stages.convert_gguf import interleaved, to_gguf
from stages.files import read_json, sha256, write_json
from stages.serve.materialise import Weights
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "hf")


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in GGUFReader(file).tensors}


@pytest.mark.parametrize(("quantization", "loss"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11), ("q8_0", 1 / 254)])
def test_it_holds_the_weights_in_llama_cpps_order(folder: Path, tmp_path: Path, quantization: str, loss: float) -> None:
    to_gguf(folder, tmp_path / "out", quantization)
    found, weights = tensors(tmp_path / "out" / "model.gguf"), Weights(folder, None)
    assert len(found) == len(weights.names)
    for theirs, name in (("token_embd.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight"), ("output_norm.weight", "model.norm.weight"),
                         ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"), ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight")):  # fmt: skip
        values = weights.whole(name)
        assert np.abs(found[theirs] - values).max() <= loss * np.abs(values).max(), theirs
    query = weights.whole("model.layers.0.self_attn.q_proj.weight")
    assert np.abs(found["blk.0.attn_q.weight"] - query).max() > loss * np.abs(query).max(), "rotary halves are not interleaved"
    assert np.abs(found["blk.0.attn_q.weight"][1] - query[4]).max() <= loss * np.abs(query).max(), "row 1 is the first of the other half"


def test_the_same_weights_give_the_same_bytes_whatever_their_type(folder: Path, tmp_path: Path) -> None:
    half = tiny_llama(tmp_path / "half", dtype="bfloat16")
    for name, source in (("one", half), ("two", half), ("other", folder)):
        to_gguf(source, tmp_path / name, "q8_0")
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two") != sha256(tmp_path / "other")
    assert {f.name for f in (tmp_path / "one").iterdir()} >= {"model.gguf", "tokenizer.json", "chat_template.jinja"}


def test_a_tied_head_is_left_to_the_embedding(tmp_path: Path) -> None:
    to_gguf(tiny_llama(tmp_path / "hf", tied=True), tmp_path / "out", "float32")
    assert "output.weight" not in tensors(tmp_path / "out" / "model.gguf")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "qwen3"}, "model_type is 'qwen3'; for llama.cpp it must be 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is"),
    ],
)
def test_another_architecture_is_refused_by_name(folder: Path, tmp_path: Path, change: dict[str, object], says: str) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    write_json(tmp_path / "hf" / "config.json", read_json(folder / "config.json") | change)
    with pytest.raises(ModelError, match=says) as caught:
        to_gguf(tmp_path / "hf", tmp_path / "out", "q8_0")
    assert "config.json" in caught.value.what and not (tmp_path / "out").exists()


def test_rows_that_do_not_fill_blocks_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Weights.whole
    monkeypatch.setattr(Weights, "whole", lambda self, name: whole(self, name)[..., :20])
    with pytest.raises(ModelError, match="rows of 20 numbers; Q8_0 takes multiples of 32"):
        to_gguf(folder, tmp_path / "out", "q8_0")
    assert not list(tmp_path.iterdir())


@given(heads=st.integers(1, 4), half=st.integers(1, 5))
def test_interleaving_pairs_the_halves_of_each_head(heads: int, half: int) -> None:
    rows = np.arange(heads * 2 * half, dtype=np.float32)[:, None]
    found = interleaved(rows, heads)[:, 0].reshape(heads, half, 2)
    assert (found[..., 1] - found[..., 0] == half).all() and sorted(found.reshape(-1)) == list(rows[:, 0])
