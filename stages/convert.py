"""Convert a Hugging Face folder into a folder that ctranslate2 serves."""

from __future__ import annotations

import shutil
from pathlib import Path

from conf.errors import ModelError
from stages.files import publish
from stages.serve.chat import FILES


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
    try:
        with publish(out) as temporary:
            Converter(str(hf_folder), trust_remote_code=False).convert(str(temporary), quantization=quantization, force=True)
            copy_tokenizer(hf_folder, temporary)
    except ValueError as error:
        raise ModelError(f"{hf_folder} cannot be converted for ctranslate2: {error}", "choose another base, or serve.engine.kind=transformers") from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config, as far as they are there, contents only (no links, no modes)."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
