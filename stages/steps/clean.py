"""What a row goes through on its own: normalise, missing fields, quality and length, personal data; then into sorted runs."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from string import ascii_letters
from typing import Literal

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.formatters.ftfy import FTFYFormatter
from ftfy.badness import is_bad

from conf.errors import DataError
from conf.schema import Filters, Missing, Normalise, Pii
from stages.pii import find
from stages.steps.order import Head
from stages.steps.rows import Dropped, Filter, Runs, redacted, to_row
from stages.steps.tally import write_tally

EMPTY_LINES = re.compile(r"\n{3,}")
TO_REPAIR = re.compile(r"[&\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]")
"""What FTFYFormatter changes whatever is around it: entities, control characters and halves of surrogate pairs."""
LETTERS = ascii_letters.encode()


def collapse(text: str) -> str:
    """Strip the text and its lines, make one blank of several, and keep at most one empty line."""
    if "\n" not in text and "\r" not in text:
        return " ".join(text.split())
    lines = (" ".join(line.split()) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip()


def is_sound(text: str) -> bool:
    """Whether FTFYFormatter would return the text as it is: nothing to take out, and each line ASCII or no mojibake by ftfy's own rule."""
    if text.isascii() and text.isprintable():
        return "&" not in text
    return not TO_REPAIR.search(text) and (text.isascii() or ("\n" not in text and len(text) <= 1_000_000 and not is_bad(text)))


class NormaliseText(PipelineStep):
    """Makes equal texts equal, in `text`, `completion`, `label` and `group`."""

    type = "FORMAT"
    name = "normalise"

    def __init__(self, settings: Normalise) -> None:
        """Args: settings: what is done."""
        super().__init__()
        self.settings = settings
        self.ftfy = FTFYFormatter()

    def normalise(self, text: str) -> str:
        """One text."""
        if self.settings.ftfy and not is_sound(text):
            text = self.ftfy.format(text)
        if self.settings.unicode and not text.isascii():
            text = unicodedata.normalize(self.settings.unicode, text)
        return collapse(text) if self.settings.whitespace else text

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents, normalised."""
        for document in data:
            document.text = self.normalise(document.text)
            for field in ("completion", "label", "group"):
                if value := document.metadata[field]:
                    document.metadata[field] = self.normalise(value)
            yield document


class MissingFields(Filter):
    """Drops, fills or fails rows with an empty field; of a document (`use: corpus`) only `text` is asked for."""

    name = "missing"

    def __init__(self, settings: Mapping[Literal["text", "completion", "label", "group"], Missing], dropped: Dropped) -> None:
        """Args: settings: field -> action. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.settings = sorted(settings.items())

    def reason(self, doc: Document) -> str | None:
        """`missing:<field>`."""
        if doc.metadata["use"] == "benchmark":
            return None
        for field, missing in self.settings:
            value = doc.text if field == "text" else doc.metadata[field]
            if value.strip() or (doc.metadata["use"] == "corpus" and field != "text"):
                continue
            if missing.action == "drop":
                return f"missing:{field}"
            if missing.action == "fail":
                remedy = f"fill it in at the source, or set preprocess.missing.{field}.action to drop or fill"
                raise DataError(f"source {doc.metadata['source']}, id {doc.id}: field {field} is empty", remedy)
            if field == "text":
                doc.text = missing.value or ""
            else:
                doc.metadata[field] = missing.value
        return None


class Quality(Filter):
    """Drops rows whose `text` is outside the limits; the limit's name is the reason."""

    name = "filters"

    def __init__(self, settings: Filters, dropped: Dropped) -> None:
        """Args: settings: the limits. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.settings = settings

    def reason(self, doc: Document) -> str | None:
        """The name of the limit that the row breaks."""
        return None if doc.metadata["use"] == "benchmark" else broken_limit(doc.text, self.settings)


def broken_limit(text: str, limits: Filters) -> str | None:
    """Name of the first limit that the text breaks, if any."""
    words = text.split()
    if len(text) < limits.min_chars:
        return "min_chars"
    if len(text) > limits.max_chars:
        return "max_chars"
    if len(words) < limits.min_words:
        return "min_words"
    if limits.min_alpha and letters(text) < limits.min_alpha * sum(map(len, words)):
        return "min_alpha"
    if limits.max_repetition < 1 and len(words) >= 10 and max(Counter(text.casefold().split()).values()) > limits.max_repetition * len(words):
        return "max_repetition"
    return None


def letters(text: str) -> int:
    """Number of letters, in any script."""
    if text.isascii():
        return len(text) - len(text.encode().translate(None, LETTERS))
    return sum(map(str.isalpha, text))


class PersonalData(Filter):
    """Writes over personal data, or drops the rows that hold any with `pii:<kind>`."""

    name = "pii"

    def __init__(self, settings: Pii, dropped: Dropped, counts: Path) -> None:
        """Args: settings: kinds and action. dropped: takes what is dropped. counts: takes the tally of finds per kind."""
        super().__init__(dropped)
        self.settings, self.counts = settings, counts
        self.redacted: Counter[str] = Counter()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents, redacted."""
        yield from super().run(data, rank, world_size)
        write_tally(self.counts, rank, {"redacted": +self.redacted})

    def reason(self, doc: Document) -> str | None:
        """Redacts the row, or says why it goes."""
        benchmark = doc.metadata["use"] == "benchmark"
        if self.settings.action == "drop" and not benchmark:
            for text in (doc.text, doc.metadata["completion"]):
                if spans := find(text, self.settings.kinds, self.settings.phone_regions):
                    return f"pii:{spans[0].kind}"
        row = redacted({"text": doc.text, **doc.metadata}, self.settings)
        if not benchmark:
            for before, after in ((doc.text, row["text"]), (doc.metadata["completion"], row["completion"])):
                if before != after:
                    for kind in self.settings.kinds:
                        self.redacted[kind] += after.count(f"<{kind.upper()}>") - before.count(f"<{kind.upper()}>")
        doc.text, doc.metadata = row.pop("text"), row
        return None


class WriteRuns(PipelineStep):
    """Keeps the cleaned rows in runs sorted by (use, source, id), each after what `order` wants to know of it; hands the benchmark rows on."""

    type = "WRITER"
    name = "runs"

    def __init__(self, folder: Path, *, keep_groups: bool) -> None:
        """Args: folder: takes the runs. keep_groups: whether a group may lie on one side only."""
        super().__init__()
        self.folder, self.keep_groups = folder, keep_groups

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write all rows but benchmark rows, which go on down the pipeline."""
        runs = Runs(self.folder, f"{rank:05d}")
        for document in data:
            row = to_row(document)
            if row["use"] == "benchmark":
                yield document
            else:
                head = Head.of(row, keep_groups=self.keep_groups)
                runs.add(head[:3], head.line(row))
        runs.close()
