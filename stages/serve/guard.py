"""The prompt-injection guard: named rules and a small linear classifier over character and word n-grams.

Light enough for the request path: numpy and safetensors, no model of its own. `redteam` trains the classifier
(stages/guard_training.py) and measures it; the service loads the very same folder.

    guard.json            {"features": {"bits", "chars", "words"}, "window": 400, "trained_on": {...}}
    weights.safetensors   "weight" float32 (2 ** bits,), "bias" float32 (1,)
"""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from conf.errors import ConfigError, ModelError
from conf.schema import Guard as Settings

INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
LOOKALIKES = str.maketrans("аеорсухіјѕԁһӏɡαερουντικ", "aeopcyxijsdhlgaepouvtik")  # Cyrillic and Greek twins


class Features(TypedDict):
    """How a text becomes numbers."""

    bits: int
    """The hash table has 2 ** bits entries."""
    chars: list[int]
    """Lengths of the character n-grams."""
    words: list[int]
    """Lengths of the word n-grams."""


FEATURES = Features(bits=16, chars=[3, 4, 5], words=[1, 2])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the guard says of one text."""

    allowed: bool
    reasons: list[str] = field(default_factory=list)
    """Names of the rules that matched, and `classifier`."""
    score: float = 0.0
    """The classifier's worst window: 0 harmless, 1 an attack."""


def normalise(text: str) -> str:
    """The text as rules and classifier read it: NFKC, no invisible characters or accents, case-folded, Latin for look-alikes, single blanks."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold().translate(LOOKALIKES)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(text.split())


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


class Guard:
    """Reads a message before the model does."""

    def __init__(self, folder: Path | None, settings: Settings) -> None:
        """Args: folder: what `redteam` trained; null: rules alone. settings: `serve.guard`.

        Raises:
            ConfigError: a rule is no regular expression.
            ModelError: the folder is incomplete or damaged.
        """
        self.settings = settings
        self.rules = {}
        for name, pattern in sorted(settings.rules.items()):
            try:
                self.rules[name] = re.compile(pattern, re.IGNORECASE)
            except re.error as error:
                raise ConfigError(f"serve.guard.rules.{name} is no regular expression: {error}: {pattern}", "mend the pattern") from error
        self.weight: np.ndarray | None = None
        if folder is not None:
            self._load(folder)

    def _load(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            self.features: Features = json.loads((folder / "guard.json").read_text(encoding="utf-8"))["features"]
            tensors = load_file(folder / "weights.safetensors")
            weight, self.bias = tensors["weight"], float(tensors["bias"][0])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"{folder} holds no guard: {error}", "run `dvc repro redteam`, or `dvc pull`") from error
        if weight.shape != (1 << self.features["bits"],) or not np.isfinite(weight).all() or not np.isfinite(self.bias):
            raise ModelError(f"{folder}: the guard's weights are damaged: shape {weight.shape}", "run `dvc repro redteam`, or `dvc pull`")
        self.weight = weight

    def score(self, text: str) -> float:
        """The worst window's probability of being an attack; 0 without a classifier."""
        if self.weight is None:
            return 0.0
        worst = -np.inf
        for window in windows(normalise(text), self.settings.window):
            index, value = features(window, **self.features)
            worst = max(worst, float(np.dot(self.weight[index].astype(np.float64), value)) + self.bias)
        return float(1 / (1 + np.exp(-np.clip(worst, -50, 50))))

    def check(self, text: str) -> Verdict:
        """Whether a message may reach the model, and why not."""
        if not self.settings.enabled:
            return Verdict(allowed=True)
        normal = normalise(text)
        reasons = [name for name, rule in self.rules.items() if rule.search(normal)]
        score = self.score(text)
        if self.weight is not None and score >= self.settings.threshold:
            reasons.append("classifier")
        return Verdict(allowed=not reasons, reasons=reasons, score=score)
