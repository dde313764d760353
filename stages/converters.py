"""Which format each engine opens, and who writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.convert import to_ctranslate2
from stages.convert_gguf import to_gguf

CONVERT: dict[str, Callable[[Path, Path, str], None]] = {"openvino": to_ctranslate2, "ctranslate2": to_ctranslate2, "llamacpp": to_gguf}
"""`serve.engine.kind` -> writes its format: of a Hugging Face folder, into another folder, in a quantization. The others open the Hugging Face folder."""
