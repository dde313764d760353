"""Conversion: complete, repeatable, safetensors only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.convert import to_ctranslate2
from stages.files import sha256
from stages.serve.engine import Sampling, open_engine
from tests.models import tiny_llama

WHOLE = {"model.bin", "config.json", "vocabulary.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "hf")


def test_the_same_model_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        to_ctranslate2(folder, tmp_path / name, "int8")
        assert {path.name for path in (tmp_path / name).iterdir()} == WHOLE
        digests.add(sha256(tmp_path / name))
    to_ctranslate2(folder, tmp_path / "one", "int8")
    assert digests == {sha256(tmp_path / "one")}, "a second conversion over the first differs"
    to_ctranslate2(folder, tmp_path / "three", "float32")
    assert sha256(tmp_path / "three") not in digests


def test_bfloat16_weights_convert_as_float32(tmp_path: Path) -> None:
    """Otherwise int8 would become int8_bfloat16, which the CPU converts back at every load."""
    folder = tiny_llama(tmp_path / "hf", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    to_ctranslate2(folder, tmp_path / "ct2", "int8")
    to_ctranslate2(tiny_llama(tmp_path / "other"), tmp_path / "float", "int8")
    assert (tmp_path / "ct2/model.bin").stat().st_size == (tmp_path / "float/model.bin").stat().st_size
    assert open_engine(tmp_path / "ct2", EngineSettings(threads=1)).generate([[1, 2]], Sampling(max_tokens=2))


def test_pickles_are_refused_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        to_ctranslate2(tmp_path, tmp_path / "out", "int8")
    assert not list(tmp_path.glob("*out*"))


def test_an_unknown_architecture_is_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be converted"):
        to_ctranslate2(tmp_path, tmp_path / "out", "int8")
    assert not list(tmp_path.glob("*out*"))
