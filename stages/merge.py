"""Merge the adapter into the base: the tuned model as one Hugging Face folder, for transformers, vLLM and whoever takes no adapter.

`python -m stages.merge <folder>` writes it in `export.dtype`. It is not kept where the adapter is (`export.store: adapter`):
base and adapter, which are, hold the same, and both peft and vLLM load them as they lie in models/export/engine.

Reads:  models/select/base, models/tune/adapter or models/tune/model
Writes: the folder
Config: export
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import conf
from conf.errors import ModelError
from conf.schema import Export
from stages.convert import copy_tokenizer
from stages.files import DISK, publish, read_json, remove, write_json
from stages.run import WORK
from stages.serve.materialise import Weights

BASE = Path("models/select/base")
TUNED = Path("models/tune")

log = logging.getLogger(__name__)


def merge(base: Path, tuned: Path, out: Path) -> int:
    """Write the tuned model in float32 with the base's tokenizer, chat template and generation config, as peft merges it.

    Args:
        tuned: folder that holds `adapter/` (LoRA, merged into the base) or `model/` (all weights).

    Returns:
        The number of parameters.

    Raises:
        ModelError: there is neither of them, or both; one is damaged; or the adapter is of another base.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    broken = (SafetensorError, ValueError, TypeError, LookupError, RuntimeError, OSError, UserWarning)
    """What transformers and peft raise for files that are damaged or do not fit."""
    adapter, model = tuned / "adapter", tuned / "model"
    if adapter.is_dir() == model.is_dir():
        raise ModelError(f"{tuned} holds {'both adapter/ and model/' if model.is_dir() else 'neither adapter/ nor model/'}", "run `dvc repro tune`")
    if adapter.is_dir() and not (adapter / "adapter_model.safetensors").is_file():  # peft would take a pickle instead
        raise ModelError(f"{adapter} has no adapter_model.safetensors", "pickled weights are not loaded: run `dvc repro tune`")
    source, stage = (base, "select") if adapter.is_dir() else (model, "tune")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False)
    except broken as error:
        refuse(f"{source} cannot be loaded", error, f"it was changed or cut short: remove it and run `dvc repro {stage}`")
    if adapter.is_dir():
        from peft import PeftModel

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay as they were before training
                loaded = PeftModel.from_pretrained(loaded, adapter, is_trainable=False, use_safetensors=True).merge_and_unload(safe_merge=True)
        except broken as error:
            refuse(f"{adapter} does not fit {base}", error, "it is damaged, or of another base: remove it and run `dvc repro tune`")
    loaded.save_pretrained(out)
    copy_tokenizer(base, out)
    return int(loaded.num_parameters())


def refuse(what: str, error: Exception, remedy: str) -> NoReturn:
    """Tell what a library said of a file.

    Raises:
        ModelError: always, but for an error of the disk.
    """
    if isinstance(error, OSError) and error.errno in DISK:
        raise error
    raise ModelError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:500]}", remedy) from error


def merge_exactly(base: Path, adapter: Path, out: Path) -> None:
    """Write what `merge` writes, up to rounding, and in the same bytes on every machine: see stages/serve/materialise.py.

    Raises:
        ModelError: the adapter is no plain LoRA, or is for another base.
    """
    from safetensors.numpy import save_file

    weights = Weights(base, adapter)
    out.mkdir(parents=True)
    save_file({name: weights.whole(name) for name in weights.names}, out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", read_json(base / "config.json") | {"dtype": "float32"})
    copy_tokenizer(base, out)


def cast(merged: Path, out: Path, dtype: str) -> None:
    """Write the merged model in another type."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, dtype), local_files_only=True).save_pretrained(out)
    copy_tokenizer(merged, out)


def main(folder: Path) -> None:
    """Merge, cast, publish.

    Raises:
        ModelError: something is there already.
    """
    settings: Export = conf.load("export")
    if folder.exists():
        raise ModelError(f"{folder} is there already", "name another folder, or remove it")
    scratch = WORK / "merge"
    remove(scratch)
    try:
        merge(BASE, TUNED, scratch)
        with publish(folder) as out:
            cast(scratch, out, settings.dtype)
    finally:
        remove(scratch)
    log.info("wrote %s in %s", folder, settings.dtype)


if __name__ == "__main__":
    from stages.run import run

    if len(sys.argv) != 2:
        sys.exit("usage: python -m stages.merge <folder>")
    run(lambda: main(Path(sys.argv[1])))
