"""Train the guard's classifier, and say on which texts it may be measured.

Texts are cut into the windows that the guard will read; a linear model over hashed n-grams (scikit-learn's logistic
regression, lbfgs, deterministic) learns them. Which half of a source trains goes by the hash of the text, so that a row
never changes side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from conf.errors import DataError
from stages.files import publish, write_json
from stages.serve.guard.classifier import FEATURES, features, windows
from stages.serve.guard.normalise import normalise

PER_TEXT = 8
"""Windows of one text that train: a long jailbreak must not outweigh a hundred short ones."""
STRENGTH = 20.0
"""Inverse of the regularisation (scikit-learn's C)."""


def trains(text: str) -> bool:
    """Whether this text is of the training half."""
    return hashlib.sha256(normalise(text).encode()).digest()[0] % 2 == 0


def split(sources: Mapping[str, Iterable[str]], holdout: Iterable[str] = ()) -> tuple[list[str], dict[str, list[str]]]:
    """Training texts of all sources together, and per source the texts that only measure. Equal texts are taken once."""
    training: list[str] = []
    measuring: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name, texts in sorted(sources.items()):
        unseen: list[str] = []
        for text in texts:
            if (normal := normalise(text)) not in seen and normal:
                seen.add(normal)
                (unseen if name in set(holdout) or not trains(text) else training).append(text)
        measuring[name] = unseen
    return training, measuring


def train(attacks: list[str], harmless: list[str], window: int, seed: int, folder: Path) -> None:
    """Fit the classifier and write the guard's folder.

    Raises:
        DataError: one of the two classes has no text.
    """
    from safetensors.numpy import save_file
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    for what, texts in (("attack", attacks), ("harmless text", harmless)):
        if not texts:
            raise DataError(f"the guard has no {what} to learn from", "redteam.holdout must leave an attack source, and redteam.benign must have rows")
    indices, values, starts, labels, weights = [], [], [0], [], []
    for label, texts in ((1, attacks), (0, harmless)):
        for text in texts:
            pieces = list(windows(normalise(text), window))
            pieces = pieces[:: max(len(pieces) // PER_TEXT, 1)][:PER_TEXT]
            for piece in pieces:
                index, value = features(piece, **FEATURES)
                indices.append(index)
                values.append(value)
                starts.append(starts[-1] + len(index))
                labels.append(label)
                weights.append(1 / len(pieces) / len(texts))
    matrix = csr_matrix((np.concatenate(values), np.concatenate(indices), starts), shape=(len(labels), 1 << FEATURES["bits"]))
    balanced = np.array(weights) * len(labels) / 2
    model = LogisticRegression(C=STRENGTH, max_iter=200, random_state=seed).fit(matrix, labels, sample_weight=balanced)
    with publish(folder) as temporary:
        temporary.mkdir(parents=True)
        tensors = {"weight": model.coef_[0], "bias": model.intercept_}
        save_file({name: tensor.round(4).astype(np.float32) for name, tensor in tensors.items()}, temporary / "weights.safetensors")
        write_json(
            temporary / "guard.json",
            {"features": FEATURES, "window": window, "seed": seed, "trained_on": {"attacks": len(attacks), "harmless": len(harmless), "windows": len(labels)}},
        )
