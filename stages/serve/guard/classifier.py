"""A small linear classifier over hashed character and word n-grams of windows of a text.

Light enough for the request path: numpy and safetensors, and no loop over n-grams. It has several heads, each with weights of its own for a kind
of attack; a text's score is that of its worst window, view and head. Training puts each head's bias where its false alarms are as declared, which
is the score 0.5. Its folder:

    guard.json            {"features": {"bits", "chars", "words"}, "window": 100, "heads": ["attack", "harm"], ...}
    weights.safetensors   "weight" float16 (heads, 2 ** bits), "bias" float32 (heads,)
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

from conf.errors import ModelError
from stages.serve.guard.normalise import views


class Features(TypedDict):
    """How a text becomes numbers."""

    bits: int
    """The hash table has 2 ** bits entries."""
    chars: list[int]
    """Lengths of the character n-grams."""
    words: list[int]
    """Lengths of the word n-grams."""


FEATURES = Features(bits=18, chars=[3, 4, 5], words=[1, 2])
TOKEN = re.compile(r"\w+|[^\w\s]")
ODD = np.uint64(0x9E3779B97F4A7C15)
PRIME = np.uint64(0x100000001B3)
"""Of FNV-1a: makes a hash depend on the order of what went into it."""


def windows(length: int, size: int) -> np.ndarray:
    """Start and end, shape (n, 2), of pieces of `size` characters that overlap by half and cover a text of that length; the last one ends with it."""
    if length <= size:
        return np.array([[0, length]])
    starts = np.append(np.arange(0, length - size, max(size // 2, 1)), length - size)
    return np.stack([starts, starts + size], axis=1)


def mix(hashes: np.ndarray) -> np.ndarray:
    """Spread 64-bit hashes evenly (the finaliser of splitmix64)."""
    hashes = hashes * ODD
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(hashes ^ (hashes >> np.uint64(31)))


def rolled(units: np.ndarray, sizes: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """For each size, the hashes of all runs of so many units, shape (len(units) - size + 1,)."""
    hashes = units
    for size in range(1, max(sizes, default=0) + 1):
        if size > len(units):
            return
        count = len(units) - size + 1
        hashes = mix(units) if size == 1 else mix(hashes[:count] * PRIME + units[size - 1 :])
        if size in sizes:
            yield size, hashes


def grams(text: str, bits: int, chars: list[int], words: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Every n-gram of a normalised text: where it begins (int64) and its place in the table (int64), sorted by beginning."""
    padded = f" {text} "
    units = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64) + np.uint64(1)
    tokens = [(found.start(), found[0]) for found in TOKEN.finditer(padded)]
    begins = np.array([start for start, _ in tokens], dtype=np.int64)
    named = np.array([zlib.crc32(token.encode("utf-8", "surrogatepass")) | len(token) << 32 for _, token in tokens], dtype=np.uint64)
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64))]
    found += [(np.arange(len(hashes)), mix(hashes + np.uint64(size))) for size, hashes in rolled(units, chars)]
    found += [(begins[: len(hashes)], mix(hashes + np.uint64(1000 + size))) for size, hashes in rolled(named, words)]
    at = np.concatenate([start for start, _ in found])
    order = np.argsort(at, kind="stable")
    return at[order], (np.concatenate([hashes for _, hashes in found])[order] & np.uint64((1 << bits) - 1)).astype(np.int64)


def features(text: str, size: int, bits: int, chars: list[int], words: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-grams of each window of a normalised text, one window after the other.

    Returns:
        Places in the table (int64, sorted in a window), values (float32, of length 1 together in a window), and where the windows begin and the last
        one ends (int64, shape (windows + 1,)).
    """
    at, places = grams(text, bits, chars, words)
    limits = np.searchsorted(at, windows(len(text), size) + np.array([0, 1]))
    counts = limits[:, 1] - limits[:, 0]
    owners = np.repeat(np.arange(len(limits)), counts)
    inside = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts - limits[:, 0], counts)
    keys = np.sort(owners << bits | places[inside])
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    seen = np.diff(first, append=len(keys)).astype(np.float64)
    owners = keys[first] >> bits
    ends = np.searchsorted(owners, np.arange(len(limits) + 1))
    lengths = np.sqrt(np.bincount(owners, weights=seen, minlength=len(limits)))
    return keys[first] & ((1 << bits) - 1), (np.sqrt(seen) / lengths[owners]).astype(np.float32), ends


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
            facts = json.loads((folder / "guard.json").read_text(encoding="utf-8"))
            self.features: Features = facts["features"]
            self.heads: list[str] = facts["heads"]
            tensors = load_file(folder / "weights.safetensors")
            self.weight, self.bias = tensors["weight"].astype(np.float32), tensors["bias"].astype(np.float64)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{folder} holds no guard: {error}", "run `dvc repro guard`, or `dvc pull`") from error
        shape = (len(self.heads), 1 << self.features["bits"])
        if self.weight.shape != shape or self.bias.shape != shape[:1] or not np.isfinite(self.weight).all() or not np.isfinite(self.bias).all():
            raise ModelError(f"{folder}: the guard's weights are damaged: shape {self.weight.shape}", "run `dvc repro guard`, or `dvc pull`")

    def logits(self, view: str) -> np.ndarray:
        """Each head's worst window of a normalised text, shape (heads,); over 0: an attack."""
        places, values, ends = features(view, self.window, **self.features)
        owners = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        each = [np.bincount(owners, weights=weight[places] * values, minlength=len(ends) - 1).max() for weight in self.weight]
        return np.asarray(each + self.bias)

    def score(self, text: str) -> float:
        """How much the worst window, view and head looks like an attack, 0 to 1; `text` as it came."""
        worst = max(float(self.logits(view).max()) for view in views(text))
        return float(1 / (1 + np.exp(-np.clip(worst, -50, 50))))
