"""Make the engine that ctranslate2 opens out of what is stored of it: the base, a LoRA adapter and a recipe.

A folder that `export` wrote with `store: adapter` holds

    base/          the base, in the bytes of models/select/base: DVC stores them once, however many variants there are
    adapter/       the adapter, in the bytes of models/tune/adapter: what peft and vLLM load
    recipe.json    the pieces of model.bin in order, and the sha256 of the folder that comes out
    the rest       the engine's other files (configuration, vocabulary, tokenizer), as they are

`stages.serve.engine_cache` keeps what is made.

Every weight is base + scale * (the sum over k of B[:, k] * A[k, :], k ascending), multiplied and added element by element in
float32: IEEE 754 leaves no choice there, while a matrix product of a BLAS rounds otherwise on another CPU or thread count.
The quantisation is ctranslate2's (`specs/model_spec.py`), row by row.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from conf.errors import ModelError
from stages.files import read_json, sha256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECIPE = "recipe.json"
BLOCK = 64 * 1024
"""Weights at a time: a few float32 arrays of so many stay in a core's cache."""
PLAIN: dict[str, tuple[object, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)} | dict.fromkeys(
    ("alora_invocation_tokens", "alpha_pattern", "fan_in_fan_out", "layer_replication", "lora_bias", "modules_to_save", "rank_pattern",
     "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora"), (None, False, {}, []),
)  # fmt: skip
"""Settings of an adapter that change what it adds, and the values with which it is alpha / rank * B A."""


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Part:
    """A piece of model.bin that comes from the weights."""

    form: Literal["float32", "int8", "scales"]
    """The numbers as they are, as 8-bit rows, or the scales of the rows that the `int8` piece of the same tensors has."""
    tensors: list[str]
    """Names in the base, one below the other."""


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Recipe:
    """recipe.json."""

    engine: str
    """sha256 of the engine's folder."""
    made_from: dict[str, str]
    """File with weights -> its sha256: to say which one is another."""
    model: list[str | Part]
    """model.bin from its first byte to its last; a text is bytes in base64."""


class Weights:
    """The tensors of a base in float32, with an adapter added."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        """Open; nothing is read yet.

        Raises:
            ModelError: a file is missing, cut short or damaged, or the adapter is no plain LoRA, or is for another base.
        """
        files = sorted(base.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{base} holds no *.safetensors", "run `dvc pull`, or `dvc repro`")
        self._stored = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
        self._updates = read_updates(adapter, self._stored) if adapter else {}

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._stored)

    def height(self, name: str) -> int:
        """Rows of a tensor; a vector is one."""
        return max(1, math.prod(self._stored[name].shape[:-1]))

    def whole(self, name: str) -> NDArray[np.float32]:
        """One tensor in its shape."""
        import numpy as np

        return np.concatenate(list(self.rows(name))).reshape(self._stored[name].shape)

    def rows(self, name: str, last: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Blocks of rows of a tensor, in order, each an array of its own of shape (some, columns); a vector is one row.

        Args:
            last: end after so many rows.
        """
        import numpy as np

        stored = self._stored[name].reshape(-1, self._stored[name].shape[-1])
        step = max(1, BLOCK // stored.shape[-1])
        for start in range(0, len(stored) if last is None else last, step):
            block = slice(start, min(start + step, last or len(stored)))
            values = to_float32(stored[block])
            if name in self._updates:
                a, b, scale = self._updates[name]
                update, product = np.zeros_like(values), np.empty_like(values)
                for k in range(len(a)):
                    np.multiply(b[block, k, None], a[k], out=product)
                    np.add(update, product, out=update)
                np.multiply(update, scale, out=update)
                np.add(values, update, out=values)
            yield values


def read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, mapped and not read; bfloat16, which numpy does not have, as uint16.

    Raises:
        ModelError: the file is missing, cut short or damaged, or holds another type.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    types = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
    try:
        with safe_open(file, framework="np"):  # checks the header, and that the file is as long as it says
            pass
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing", "run `dvc pull`, or `dvc repro`") from error
    except SafetensorError as error:
        raise ModelError(f"{file} is cut short or damaged: {error}", "remove it and run `dvc pull`, or `dvc repro`") from error
    data = np.memmap(file, dtype=np.uint8, mode="r")
    length = 8 + int.from_bytes(data[:8].tobytes(), "little")
    tensors = {}
    for name, entry in json.loads(data[8:length].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in types:
            raise ModelError(f"{file}: {name} is of type {entry['dtype']}", f"save it in one of {', '.join(types)}")
        first, last = (length + at for at in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def to_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """A copy in float32; uint16 stands for bfloat16, which is the upper half of a float32."""
    import numpy as np

    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def not_plain(adapter: Path) -> str | None:
    """Why an adapter is more than alpha / rank * B A; null: it is just that."""
    config = read_json(adapter / "adapter_config.json")
    return next((f"{key}={config[key]!r}" for key, plain in PLAIN.items() if key in config and config[key] not in plain), None)


def read_updates(adapter: Path, stored: Mapping[str, NDArray[Any]]) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32], np.float32]]:
    """Tensor of the base -> A of shape (rank, columns), B of shape (rows, rank), and the scale.

    Raises:
        ModelError: it is no plain LoRA adapter, or its shapes are not those of the base.
    """
    import numpy as np

    if (reason := not_plain(adapter)) is not None:
        raise ModelError(f"{adapter} is no plain LoRA adapter: {reason}", "set export.store: engine")
    config = read_json(adapter / "adapter_config.json")
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    updates = {}
    for name, tensor in sorted(tensors.items()):
        module, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        if kind not in {"A.weight", "B.weight"} or not name.startswith("base_model.model."):
            raise ModelError(f"{adapter} is no plain LoRA adapter: it holds {name}", "set export.store: engine")
        if kind == "B.weight":
            continue
        a, b = tensor, tensors.get(name.replace(".lora_A.", ".lora_B."), np.empty((0, 0)))
        changed, target = (len(b), a.shape[-1]), stored.get(f"{module}.weight")
        if target is None or target.shape != changed or b.shape[-1] != len(a):
            there = "not there" if target is None else f"of shape {target.shape}"
            raise ModelError(f"{adapter} is for another base: it changes {module}.weight of shape {changed}, which is {there}", "run `dvc repro tune`")
        updates[f"{module}.weight"] = to_float32(a), to_float32(b), np.float32(config["lora_alpha"] / len(a))
    return updates


def quantise(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """8-bit rows and the scale of each, as ctranslate2 makes them; the values are overwritten."""
    import numpy as np

    largest = np.amax(np.absolute(values), axis=1)
    largest[largest == 0] = 127.0
    scale = np.float32(127.0) / np.maximum(largest, np.float32(127) / np.finfo(np.float32).max)
    np.multiply(values, scale[:, None], out=values)
    return np.rint(values, out=values).astype(np.int8), scale


def write_model(model: Sequence[str | Part], weights: Weights, file: Path) -> None:
    """Write model.bin, a block of rows at a time.

    Raises:
        ModelError: the base lacks a tensor.
    """
    scales: dict[tuple[str, ...], list[bytes]] = {}
    known = set(weights.names)
    with file.open("wb") as out:
        for part in model:
            if isinstance(part, str):
                out.write(base64.b64decode(part))
                continue
            if missing := [name for name in part.tensors if name not in known]:
                raise ModelError(f"the base holds no {missing[0]}, which {RECIPE} names", "it is another base: run `dvc pull`, or `dvc repro export`")
            if part.form == "scales":
                out.writelines(scales[tuple(part.tensors)])
                continue
            found = scales[tuple(part.tensors)] = []
            for values in (block for name in part.tensors for block in weights.rows(name)):
                if part.form == "float32":
                    out.write(values.astype("<f4", copy=False).tobytes())
                else:
                    rows, scale = quantise(values)
                    out.write(rows.tobytes())
                    found.append(scale.astype("<f4", copy=False).tobytes())


def read_recipe(file: Path) -> Recipe:
    """Read recipe.json.

    Raises:
        ModelError: it is damaged.
    """
    try:
        return TypeAdapter(Recipe).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ModelError(
            f"{file} is no recipe: {error.errors(include_url=False, include_input=False)[0]['msg']}", "run `dvc pull`, or `dvc repro export`"
        ) from error


def materialise(folder: Path, recipe: Recipe, out: Path) -> None:
    """Write the engine's folder.

    Raises:
        ModelError: what is stored does not give the engine that the recipe names.
    """
    weights = Weights(folder / "base", folder / "adapter")
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != RECIPE:
            shutil.copyfile(file, out / file.name)
    write_model(recipe.model, weights, out / "model.bin")
    if (actual := sha256(out)) != recipe.engine:
        other = [name for name, digest in recipe.made_from.items() if not (folder / name).is_file() or sha256(folder / name) != digest]
        what = f"{' and '.join(other) or f'a file beside {RECIPE}'} is not what was exported"
        raise ModelError(f"{folder} gives the engine {actual}, not {recipe.engine}: {what}", "run `dvc checkout`, `dvc pull`, or `dvc repro export`")
