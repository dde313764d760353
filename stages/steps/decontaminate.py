"""Training rows that repeat an evaluation row: n-grams of words as 64-bit hashes, one sorted array per evaluation set."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text

from conf.schema import Decontaminate
from stages.steps.rows import Dropped

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, kana and Han: scripts without blanks between words."""
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
ASCII = TextNormConfig(norm_unicode_diacritics=False)
HASHING = HashConfig(hash_fc="sha1")
"""Datatrove's xxhash calls fail with xxhash 4, which no longer takes a str."""
HASH = create_hash_func(HASHING)
ROWS_HELD = 5_000
"""Evaluation rows whose n-grams are held before they are written."""


def words(text: str) -> list[str]:
    """Words without case, punctuation and accents, numbers made equal; one per character in scripts without blanks."""
    simple: str = simplify_text(text, ASCII) if text.isascii() else simplify_text(text)
    return WORD.findall(simple)


def hashes(text: str, size: int) -> np.ndarray:
    """Hashes of the text's n-grams, shape (n,), each once; a text shorter than `size` words is one n-gram, an empty one none."""
    tokens = words(text)
    grams = ngrams(tokens, size) if len(tokens) >= size else [tokens] if tokens else []
    return np.fromiter({HASH(" ".join(gram)) for gram in grams}, dtype=np.uint64)


class IndexEvaluation(PipelineStep):
    """Writes the n-grams of the evaluation rows that pass: benchmark rows, and rows whose split is `test`."""

    type = "DECONT"
    name = "index"

    def __init__(self, folder: Path, settings: Decontaminate | None) -> None:
        """Args: folder: takes `<evaluation set>/<n>.npy`. settings: n-gram size; null writes nothing."""
        super().__init__()
        self.folder, self.settings = folder, settings

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents as they are."""
        grams: dict[str, list[np.ndarray]] = {}
        written = 0
        for document in data:
            evaluation = document.metadata["source"] if document.metadata["use"] == "benchmark" else document.metadata.get("split")
            if self.settings and (document.metadata["use"] == "benchmark" or evaluation == "test"):
                grams.setdefault(str(evaluation), []).append(hashes(document.text, self.settings.ngram))
                if sum(map(len, grams.values())) >= ROWS_HELD:
                    written = self.write(grams, rank, written)
            yield document
        self.write(grams, rank, written)

    def write(self, grams: dict[str, list[np.ndarray]], rank: int, number: int) -> int:
        """Write and forget what was gathered; returns the next number."""
        for name, arrays in grams.items():
            path = self.folder / name / f"{rank:05d}-{number:06d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.unique(np.concatenate(arrays)))
        grams.clear()
        return number + 1


def join_index(folder: Path) -> None:
    """Make one sorted array of each evaluation set: `<folder>/<set>.npy`."""
    for pieces in sorted(p for p in folder.glob("*") if p.is_dir()):
        np.save(folder / f"{pieces.name}.npy", np.unique(np.concatenate([np.load(piece) for piece in sorted(pieces.glob("*.npy"))])))


class DropContaminated(BaseFilter):
    """Drops training rows and documents of which too many n-grams occur in one evaluation set, with `contaminated:<set>`."""

    name = "decontaminate"

    def __init__(self, folder: Path, settings: Decontaminate | None, dropped: Dropped) -> None:
        """Args: folder: of the index. settings: null lets everything pass. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.folder, self.settings = folder, settings
        self.index: dict[str, np.ndarray] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the row stays, or which evaluation set it repeats most."""
        if self.settings is None or doc.metadata["split"] not in ("train", "corpus"):
            return True
        if self.index is None:
            self.index = {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}
        grams = hashes(doc.text, self.settings.ngram)
        shares = {name: overlap(grams, known) for name, known in self.index.items()}
        worst = max(shares, key=lambda name: shares[name], default="")
        return (False, f"contaminated:{worst}") if worst and shares[worst] > self.settings.max_overlap else True


def overlap(grams: np.ndarray, known: np.ndarray) -> float:
    """Share of the n-grams that are in the sorted array."""
    if not len(grams) or not len(known):
        return 0.0
    at = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    return float(np.mean(known[at] == grams))
