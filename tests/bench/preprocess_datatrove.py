"""Preprocess as a script of plain datatrove: `python -m tests.bench.preprocess_datatrove [workers]`, in a folder with data/collect.

Its own reader, formatters, filters, MinHash stages and writers, as its examples put them together. Two things differ from stock,
both in its favour: words are split at blanks (its tokenizer would load spaCy), and exact repeats go by a set in memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from tests.bench.preprocess_cleaning import BUCKETS, DECONTAMINATE, HASHES, MAX_CHARS, NGRAM, OVERLAP, messages, normalise, redact, redact_numbers, trains

CONFIG = MinhashConfig(NGRAM, BUCKETS, HASHES, hash_config=HashConfig(hash_fc="sha1"))


class Words(WhitespaceTokenizer):
    """Words split at blanks."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words."""
        return text.split()


class Blanks(BaseFormatter):
    """NFC and blanks of the text, after FTFYFormatter; all of it for the other fields."""

    name = "blanks"

    def format(self, text: str) -> str:
        """One text."""
        return text

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents."""
        import unicodedata

        for doc in data:
            lines = (" ".join(line.split()) for line in unicodedata.normalize("NFC", doc.text).splitlines())
            doc.text = "\n".join(lines).strip()
            for field in ("completion", "label", "group"):
                doc.metadata[field] = normalise(doc.metadata[field])
            yield doc


class Numbers(BaseFormatter):
    """What PIIFormatter does not know: bank accounts, cards and telephone numbers; and all of it in the completion."""

    name = "numbers"

    def format(self, text: str) -> str:
        """One text."""
        return redact_numbers(text)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents."""
        for doc in super().run(data, rank, world_size):
            doc.metadata["completion"] = redact(doc.metadata["completion"])
            yield doc


class FirstOfEqual:
    """Whether the text has not been seen; every row of the evaluation passes."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def __call__(self, doc: Document) -> bool:
        digest = hashlib.sha256(doc.text.casefold().encode()).digest()[:16]
        new = digest not in self.seen
        self.seen.add(digest)
        return new or doc.metadata["source"] == "official"


class Decontaminate:
    """Whether a training row repeats too few of the evaluation's n-grams; these are read when the first row comes."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def grams(self, text: str) -> set[int]:
        """Hashes of a text's n-grams."""
        words = simplify_text(text).split()
        return {int.from_bytes(hashlib.sha1(" ".join(gram).encode()).digest()[:8]) for gram in ngrams(words, DECONTAMINATE)} if words else set()

    def __call__(self, doc: Document) -> bool:
        if not self.known:
            for path in sorted(Path("work/clean").glob("*.jsonl")):
                with path.open(encoding="utf-8") as file:
                    self.known.update(*(self.grams(row["text"]) for row in map(json.loads, file) if row["source"] == "official"))
        own = self.grams(doc.text)
        return doc.metadata["source"] == "official" or len(own & self.known) <= OVERLAP * len(own)


class Format(PipelineStep):
    """The conversation, and the side that a row is on."""

    type, name = "FORMAT", "chat"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents."""
        for doc in data:
            doc.metadata["messages"] = messages(doc.text, doc.metadata["completion"])
            train = trains(doc.metadata["source"], doc.id)
            doc.metadata["split"] = "test" if doc.metadata["source"] == "official" else "train" if train else "validation"
            yield doc


def row(self: JsonlReader, data: dict[str, object], path: str, id_in_file: int | str) -> dict[str, object]:
    """A line as the reader wants it: text, id, and the rest as metadata."""
    return {"text": data.pop("text") or " ", "id": data.pop("id"), "metadata": data}


def flat(self: JsonlWriter, doc: Document) -> dict[str, object]:
    """A document as a line of the same form."""
    return {"text": doc.text, "id": doc.id, **doc.metadata}


def main() -> None:
    """The four stages of its example for MinHash, the first with all that cleans a text."""
    workers = int(sys.argv[1]) if sys.argv[1:] else 1
    clean = [
        JsonlReader("data/collect", glob_pattern="*.jsonl", adapter=row),
        FTFYFormatter(), Blanks(),
        LambdaFilter(lambda doc: bool(doc.text)),
        LambdaFilter(lambda doc: len(doc.text) <= MAX_CHARS),
        PIIFormatter(only_remove_public_ips=False, email_replacement="<EMAIL>", ip_replacement="<IP>"), Numbers(),
        LambdaFilter(FirstOfEqual()),
        JsonlWriter("work/clean", output_filename="${rank}.jsonl", compression=None, adapter=flat),
    ]  # fmt: skip
    LocalPipelineExecutor(clean, tasks=1, logging_dir="work/logs/clean").run()
    reader = JsonlReader("work/clean", adapter=row)
    sign = MinhashDedupSignature("work/signatures", config=CONFIG, language=Words())
    LocalPipelineExecutor([reader, sign], tasks=1, workers=workers, logging_dir="work/logs/sign").run()
    LocalPipelineExecutor(
        [MinhashDedupBuckets("work/signatures", "work/pairs", config=CONFIG)], tasks=BUCKETS, workers=workers, logging_dir="work/logs/pairs"
    ).run()
    LocalPipelineExecutor([MinhashDedupCluster("work/pairs", "work/remove", config=CONFIG)], tasks=1, logging_dir="work/logs/cluster").run()
    finish = [
        reader, MinhashDedupFilter("work/remove"), LambdaFilter(Decontaminate()), Format(),
        JsonlWriter("out", output_filename="${split}/${rank}.jsonl", compression=None, adapter=flat),
    ]  # fmt: skip
    LocalPipelineExecutor(finish, tasks=1, workers=workers, logging_dir="work/logs/finish").run()


if __name__ == "__main__":
    main()
