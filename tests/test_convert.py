"""Conversion: complete, repeatable, safetensors only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.convert import find_recipe, store, to_ctranslate2
from stages.files import sha256
from stages.merge import merge_exactly
from stages.serve.engine import Sampling, open_engine
from stages.serve.materialise import Weights, materialise
from stages.serve.model_bin import VERSION
from tests.models import tiny_llama
from tests.variants import adapter_of

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


@pytest.mark.parametrize("quantization", ["int8", "int8_float32", "float32"])
@pytest.mark.parametrize(("family", "settings"), [("Llama", {"tie_word_embeddings": True}), ("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Mistral", {})])
def test_a_recipe_is_found_whatever_the_architecture(tmp_path: Path, family: str, settings: dict[str, object], quantization: str) -> None:
    """Everything of model.bin comes from tensors of the base: joined and tied ones, the norms of queries and keys; joined biases are in the recipe."""
    import torch
    import transformers

    base, adapter = tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
        **settings,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0)
    model.to(torch.bfloat16).save_pretrained(base)
    adapter_of(base, adapter)
    merge_exactly(base, adapter, tmp_path / "merged")
    to_ctranslate2(tmp_path / "merged", tmp_path / "engine", quantization)
    recipe = find_recipe(tmp_path / "engine", base, adapter)
    assert recipe is not None
    assert {name for part in recipe.model if not isinstance(part, str) for name in part.tensors} == {
        name for name in Weights(base, adapter).names if not name.endswith("_proj.bias")
    }
    store(tmp_path / "engine", recipe, base, adapter, tmp_path / "stored")
    materialise(tmp_path / "stored", recipe, tmp_path / "again")
    assert sha256(tmp_path / "again") == sha256(tmp_path / "engine")


def test_no_recipe_is_found_for_another_base(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path / "adapter")
    to_ctranslate2(tiny_llama(tmp_path / "other", seed=8), tmp_path / "engine", "int8")
    assert find_recipe(tmp_path / "engine", folder, adapter) is None


def test_no_recipe_is_found_in_a_format_that_is_not_known(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path / "adapter")
    to_ctranslate2(folder, tmp_path / "engine", "int8")
    file = tmp_path / "engine/model.bin"
    file.write_bytes((VERSION + 1).to_bytes(4, "little") + file.read_bytes()[4:])
    assert find_recipe(tmp_path / "engine", folder, adapter) is None
