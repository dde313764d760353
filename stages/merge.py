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
from pathlib import Path

import conf
from conf.errors import ModelError
from conf.schema import Export
from stages.convert import copy_tokenizer
from stages.files import publish, read_json, remove, write_json
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
        ModelError: there is neither of them, or both.
    """
    import torch
    from transformers import AutoModelForCausalLM

    adapter, model = tuned / "adapter", tuned / "model"
    if adapter.is_dir() == model.is_dir():
        raise ModelError(f"{tuned} holds {'both adapter/ and model/' if model.is_dir() else 'neither adapter/ nor model/'}", "run `dvc repro tune`")
    loaded = AutoModelForCausalLM.from_pretrained(
        base if adapter.is_dir() else model, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    if adapter.is_dir():
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter, is_trainable=False, use_safetensors=True).merge_and_unload(safe_merge=True)
    loaded.save_pretrained(out)
    copy_tokenizer(base, out)
    return int(loaded.num_parameters())


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
