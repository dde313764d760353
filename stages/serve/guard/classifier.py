"""A small linear classifier over hashed character and word n-grams of windows of a text.

Light enough for the request path: numpy and safetensors. Its folder:

    guard.json            {"features": {"bits", "chars", "words"}, "window": 400, "trained_on": {...}}
    weights.safetensors   "weight" float32 (2 ** bits,), "bias" float32 (1,)
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

from conf.errors import ModelError
from stages.serve.guard.normalise import normalise


class Features(TypedDict):
    """How a text becomes numbers."""

    bits: int
    """The hash table has 2 ** bits entries."""
    chars: list[int]
    """Lengths of the character n-grams."""
    words: list[int]
    """Lengths of the word n-grams."""


FEATURES = Features(bits=16, chars=[3, 4, 5], words=[1, 2])


def windows(text: str, size: int) -> Iterator[str]:
    """Pieces of `size` characters that overlap by half and cover the text; the whole text where it is shorter."""
    step = max(size // 2, 1)
    yield text[:size]
    for start in range(step, max(len(text) - size + step, 0), step):
        yield text[start : start + size]


def features(text: str, bits: int, chars: list[int], words: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hashed n-grams of a normalised text: their indices (int64, sorted) and weights (float32, of length 1 together)."""
    padded, tokens = f" {text} ", re.findall(r"\w+|[^\w\s]", text)
    grams = [f"c{padded[i : i + n]}" for n in chars for i in range(len(padded) - n + 1)]
    grams += [f"w{' '.join(tokens[i : i + n])}" for n in words for i in range(len(tokens) - n + 1)]
    counts = Counter(zlib.crc32(gram.encode()) & ((1 << bits) - 1) for gram in grams)
    index = np.array(sorted(counts), dtype=np.int64)
    value = np.sqrt(np.array([counts[i] for i in index.tolist()], dtype=np.float32))
    return index, value / max(float(np.linalg.norm(value)), 1e-9)


class Classifier:
    """What a folder holds."""

    def __init__(self, folder: Path, window: int) -> None:
        """Args: folder: what training wrote. window: characters read at a time.

        Raises:
            ModelError: the folder is incomplete or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self.window = window
        try:
            self.features: Features = json.loads((folder / "guard.json").read_text(encoding="utf-8"))["features"]
            tensors = load_file(folder / "weights.safetensors")
            self.weight, self.bias = tensors["weight"], float(tensors["bias"][0])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"{folder} holds no guard: {error}", "run `dvc repro redteam`, or `dvc pull`") from error
        if self.weight.shape != (1 << self.features["bits"],) or not np.isfinite(self.weight).all() or not np.isfinite(self.bias):
            raise ModelError(f"{folder}: the guard's weights are damaged: shape {self.weight.shape}", "run `dvc repro redteam`, or `dvc pull`")

    def score(self, text: str) -> float:
        """The worst window's probability of being an attack; `text` as it came."""
        worst = -np.inf
        for window in windows(normalise(text), self.window):
            index, value = features(window, **self.features)
            worst = max(worst, float(np.dot(self.weight[index].astype(np.float64), value)) + self.bias)
        return float(1 / (1 + np.exp(-np.clip(worst, -50, 50))))
