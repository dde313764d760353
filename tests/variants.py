"""A base with a LoRA adapter, and what export stores of the two."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.convert import find_recipe, store, to_ctranslate2
from stages.merge import merge_exactly
from tests.models import tiny_llama

TARGETS = ("q_proj", "v_proj", "up_proj")


def adapter_of(base: Path, out: Path, seed: int = 1, **settings: object) -> Path:
    """Write an untrained adapter that changes what the base says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "target_modules": list(TARGETS), "init_lora_weights": False} | settings)
    get_peft_model(model, config).save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    return out


def stored_variant(folder: Path, quantization: str = "int8") -> Path:
    """A folder with `base/`, `adapter/`, `engine/` (as ctranslate2's converter wrote it) and `stored/` (what export keeps)."""
    base = tiny_llama(folder / "base", dtype="bfloat16")
    adapter = adapter_of(base, folder / "adapter")
    merge_exactly(base, adapter, folder / "merged")
    to_ctranslate2(folder / "merged", folder / "engine", quantization)
    recipe = find_recipe(folder / "engine", base, adapter)
    assert recipe is not None
    store(folder / "engine", recipe, base, adapter, folder / "stored")
    shutil.rmtree(folder / "merged")
    return folder
