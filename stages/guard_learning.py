"""Fit the guard's classifier: a linear model over hashed n-grams of windows for each head (scikit-learn's logistic regression, lbfgs, deterministic).

An attack is hidden somewhere in its text, so most windows of a long one are harmless. After a first fit, only the windows of an attack that look at
least half as bad as its worst one teach as attacks. Short attacks also teach in the middle of a harmless text, and harmless texts also joined to
long ones, so that neither a customer's greeting nor length decides.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conf.errors import DataError
from conf.schema import Guard
from stages.files import write_json
from stages.guard_texts import Sample, digest
from stages.serve.guard.classifier import Features, features
from stages.serve.guard.normalise import normalise

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PER_TEXT = 8
"""Windows of one text that teach: a long jailbreak must not outweigh a hundred short ones."""
ROUNDS = 2
"""Fits after the first one, on the worst windows of each attack."""
SHORT = 400
"""Characters of an attack that is short enough to be put into a harmless text."""
KEPT = 5
"""Every so many harmless texts calibrate instead of teaching the weights."""


def matrix(texts: list[str], window: int, shape: Features, most: int | None = PER_TEXT) -> tuple[csr_matrix, np.ndarray]:
    """The windows of texts as rows (n, 2 ** bits), and to which text each belongs, shape (n,); of long texts, evenly spread ones."""
    from scipy.sparse import csr_matrix

    places, values, lengths, owners = [], [], [], []
    for number, text in enumerate(texts):
        index, value, ends = features(normalise(text), window, **shape)
        count = len(ends) - 1
        for piece in range(0, count, max(count // most, 1))[:most] if most else range(count):
            places.append(index[ends[piece] : ends[piece + 1]])
            values.append(value[ends[piece] : ends[piece + 1]])
            lengths.append(len(places[-1]))
            owners.append(number)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return csr_matrix((np.concatenate(values), np.concatenate(places), starts), shape=(len(owners), 1 << shape["bits"])), np.array(owners)


def shares(owners: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Weights of windows by which every text weighs the same, and all together 1; windows that are not `counted` weigh nothing."""
    counted = np.ones(len(owners)) if counted is None else counted.astype(np.float64)
    return np.asarray(counted / np.bincount(owners, weights=counted)[owners] / (owners[-1] + 1))


def worst(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The largest value of each text's windows, shape (texts,)."""
    found = np.full(owners[-1] + 1, -np.inf)
    np.maximum.at(found, owners, values)
    return found


def joined(texts: list[str], count: int, seed: int) -> list[str]:
    """So many long texts of three to ten short ones."""
    draw = random.Random(f"joined {seed}")
    return [" ".join(draw.choice(texts) for _ in range(draw.randint(3, 10))) for _ in range(count)]


def hosted(attacks: list[str], hosts: list[str], seed: int) -> list[str]:
    """Each short attack before or after a harmless text."""
    draw = random.Random(f"hosted {seed}")
    return [" ".join(draw.sample((attack, draw.choice(hosts)), 2)) for attack in attacks if len(attack) <= SHORT]


def fit(attacks: tuple[csr_matrix, np.ndarray], harmless: tuple[csr_matrix, np.ndarray], settings: Guard) -> tuple[np.ndarray, float]:
    """Weights (2 ** bits,) and bias of one head."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    rows = vstack([attacks[0], harmless[0]]).tocsr()
    labels = np.r_[np.ones(attacks[0].shape[0]), np.zeros(harmless[0].shape[0])]
    counted = np.ones(attacks[0].shape[0], dtype=bool)
    for _ in range(1 + ROUNDS):
        weights = np.r_[shares(attacks[1], counted), shares(harmless[1])] * len(labels) / 2
        taught = weights > 0
        model = LogisticRegression(C=settings.strength, max_iter=300, random_state=settings.seed).fit(
            rows[taught], labels[taught], sample_weight=weights[taught]
        )
        likely = 1 / (1 + np.exp(-np.clip(model.decision_function(attacks[0]), -30, 30)))
        counted = likely >= 0.5 * worst(likely, attacks[1])[attacks[1]]
    return model.coef_[0], float(model.intercept_[0])


def train(learnt: list[Sample], settings: Guard, window: int, folder: Path) -> None:
    """Fit every head, put its bias where it refuses the declared share of the kept harmless texts, and write the classifier's two files.

    Raises:
        DataError: a head has no attack to learn, or no harmless text is left to calibrate on.
    """
    from safetensors.numpy import save_file

    shape = Features(bits=settings.bits, chars=settings.chars, words=settings.words)
    ordered = sorted((sample.text for sample in learnt if not sample.hostile), key=digest)
    kept, teaching = ordered[::KEPT], [text for number, text in enumerate(ordered) if number % KEPT]
    if not teaching:
        raise DataError(f"the guard has {len(ordered)} harmless text to learn", "name more sources in guard.benign")
    harmless = matrix(teaching + joined(teaching, settings.joined, settings.seed), window, shape)
    calibrating = matrix(kept, window, shape, most=None)
    weights, biases, counts = [], [], {}
    for head, families in settings.heads.items():
        attacks = sorted((sample.text for sample in learnt if sample.hostile and sample.family in families), key=digest)
        if not attacks:
            raise DataError(
                f"guard.heads.{head} has no attack to learn ({', '.join(families)})", "name a source of one of its families in guard.attacks, or drop it"
            )
        weight, bias = fit(matrix(attacks + hosted(attacks, teaching, settings.seed), window, shape), harmless, settings)
        weight = weight.astype(np.float16)
        limit = np.quantile(worst(calibrating[0] @ weight.astype(np.float32) + bias, calibrating[1]), 1 - settings.calibrate, method="higher")
        weights.append(weight)
        biases.append(bias - max(float(limit), 0.0))  # never below even odds: what is like nothing that was learnt must pass
        counts[head] = len(attacks)
    save_file({"weight": np.stack(weights), "bias": np.array(biases).round(4).astype(np.float32)}, folder / "weights.safetensors")
    facts = {"attacks": counts, "harmless": len(teaching), "calibrated_on": len(kept)}
    write_json(folder / "guard.json", {"features": shape, "window": window, "heads": list(settings.heads), "seed": settings.seed, "trained_on": facts})
