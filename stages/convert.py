"""Convert a Hugging Face folder into a folder that ctranslate2 serves, and find the recipe that makes it again from base and adapter."""

from __future__ import annotations

import base64
import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from conf.errors import ModelError
from stages.files import publish, sha256, write_json
from stages.serve.chat import FILES
from stages.serve.materialise import RECIPE, Part, Recipe, Weights, quantise, write_model
from stages.serve.model_bin import variables

TYPES: dict[int, Literal["float32", "int8"]] = {0: "float32", 1: "int8"}
"""ctranslate2's number of a type -> the type that a recipe can make."""
LITERAL = 1_000_000
"""Most bytes of model.bin that a recipe may hold itself."""


def to_ctranslate2(hf_folder: Path, out: Path, quantization: str) -> None:
    """Write `model.bin`, `config.json`, `vocabulary.json` and the tokenizer's files into `out`, whole or not at all.

    The weights are read as float32 whatever their stored type, so that `int8` means 8-bit matrices beside float32 norms on
    every machine (from bfloat16 weights ctranslate2 would make int8_bfloat16, which most CPUs convert back at each load).
    Same input, same bytes.

    Raises:
        ModelError: no safetensors, an architecture that ctranslate2 does not know, or a broken tokenizer.
    """
    import torch
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        """Loads safetensors only, as float32, and only from the folder."""

        def load_model(self, model_class, model_name_or_path, **kwargs):  # type: ignore[no-untyped-def]
            """Load the model."""
            return model_class.from_pretrained(model_name_or_path, **{**kwargs, "dtype": torch.float32, "use_safetensors": True, "local_files_only": True})

    if not any(hf_folder.glob("*.safetensors")):
        raise ModelError(f"{hf_folder} holds no *.safetensors", "save the model as safetensors; pickled weights are not loaded")
    gc.freeze()  # the converter collects garbage after every block: looking through all of torch each time took 13 of 17 s
    try:
        with publish(out) as temporary:
            Converter(str(hf_folder), trust_remote_code=False).convert(str(temporary), quantization=quantization, force=True)
            copy_tokenizer(hf_folder, temporary)
    except ValueError as error:
        raise ModelError(f"{hf_folder} cannot be converted for ctranslate2: {error}", "choose another base, or serve.engine.kind=transformers") from error
    finally:
        gc.unfreeze()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config, as far as they are there, contents only (no links, no modes)."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def find_recipe(engine: Path, base: Path, adapter: Path) -> Recipe | None:
    """How `materialise` makes the engine's model.bin from the base and the adapter; null: not in this way.

    No architecture is known here: a matrix of model.bin is recognised by its rows, as those of a tensor of the base with the adapter
    added. What is not recognised (numbers of the architecture, joined biases) is put into the recipe as it is, unless it is large. The
    recipe is tried before it is given.
    """
    weights, data = Weights(base, adapter), (engine / "model.bin").read_bytes()
    known = first_rows(weights)
    pieces: list[tuple[int, int, Part]] = []
    quantised: dict[str, list[str]] = {}
    for name, kind, shape, start, end in variables(data):
        if (tensors := quantised.get(name.removesuffix("_scale"))) is not None:
            pieces.append((start, end, Part(form="scales", tensors=tensors)))
        elif shape and (form := TYPES.get(kind)) and (tensors := recognise(data[start:end], form, shape[-1], known, weights)):
            pieces.append((start, end, Part(form=form, tensors=tensors)))
            if form == "int8":
                quantised[name] = tensors
    if len(data) - sum(end - start for start, end, _ in pieces) > min(LITERAL, len(data) // 2):
        return None
    model: list[str | Part] = []
    done = 0
    for start, end, part in pieces:
        model += [base64.b64encode(data[done:start]).decode(), part]
        done = end
    model.append(base64.b64encode(data[done:]).decode())
    with tempfile.TemporaryDirectory(prefix="trunkline-recipe-", dir=engine.parent) as scratch:
        tried = Path(scratch) / "model.bin"
        write_model(model, weights, tried)
        if sha256(tried) != sha256(engine / "model.bin"):
            return None
    files = [*base.glob("*.safetensors"), adapter / "adapter_model.safetensors"]
    return Recipe(engine=sha256(engine), made_from={f"{file.parent.name}/{file.name}": sha256(file) for file in sorted(files)}, model=model)


def first_rows(weights: Weights) -> dict[tuple[str, bytes], str]:
    """Form and bytes of a first row -> the tensor that begins with it; of several, the first by name."""
    known = {}
    for name in reversed(weights.names):
        row = next(weights.rows(name, 1))
        known["float32", row.astype("<f4").tobytes()] = name
        known["int8", quantise(row)[0].tobytes()] = name
    return known


def recognise(data: bytes, form: str, columns: int, known: Mapping[tuple[str, bytes], str], weights: Weights) -> list[str]:
    """The tensors that lie in a matrix of model.bin, one below the other; empty: others than those that are known."""
    width, tensors, at = columns * (4 if form == "float32" else 1), [], 0
    while at < len(data):
        found = known.get((form, data[at : at + width]))
        if found is None:
            return []
        tensors.append(found)
        at += weights.height(found) * width
    return tensors


def store(engine: Path, recipe: Recipe, base: Path, adapter: Path, out: Path) -> None:
    """Write the folder that `stages.serve.engine_cache.opened` makes the engine from: contents only, no links, no modes."""
    out.mkdir(parents=True)
    for source in (base, adapter):
        shutil.copytree(source, out / source.name, copy_function=shutil.copyfile)
    for file in engine.iterdir():
        if file.name != "model.bin":
            shutil.copyfile(file, out / file.name)
    write_json(out / RECIPE, asdict(recipe))
