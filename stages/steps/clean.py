"""What a row goes through on its own: normalise, missing fields, quality and length, personal data; then into sorted runs."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.ftfy import FTFYFormatter

from conf.errors import DataError
from conf.schema import Filters, Missing, Normalise, Pii
from stages.pii import find
from stages.steps.rows import Dropped, Runs, key, redacted, to_row
from stages.steps.tally import write_tally

BLANKS = re.compile(r"[^\S\n]+")
EMPTY_LINES = re.compile(r"\n{3,}")


def collapse(text: str) -> str:
    """Strip the text and its lines, make one blank of several, and keep at most one empty line."""
    lines = (line.strip() for line in BLANKS.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n")).split("\n"))
    return EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip()


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
        """One text; ASCII without an ampersand or control character needs no repair."""
        if self.settings.ftfy and not (text.isascii() and text.isprintable() and "&" not in text):
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


class MissingFields(BaseFilter):
    """Drops, fills or fails rows with an empty field; of a document (`use: corpus`) only `text` is asked for."""

    name = "missing"

    def __init__(self, settings: Mapping[Literal["text", "completion", "label", "group"], Missing], dropped: Dropped) -> None:
        """Args: settings: field -> action. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.settings = settings

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the row stays, or `missing:<field>`."""
        if doc.metadata["use"] == "benchmark":
            return True
        for field, missing in sorted(self.settings.items()):
            value = doc.text if field == "text" else doc.metadata[field]
            if value.strip() or (doc.metadata["use"] == "corpus" and field != "text"):
                continue
            if missing.action == "drop":
                return False, f"missing:{field}"
            if missing.action == "fail":
                remedy = f"fill it in at the source, or set preprocess.missing.{field}.action to drop or fill"
                raise DataError(f"source {doc.metadata['source']}, id {doc.id}: field {field} is empty", remedy)
            if field == "text":
                doc.text = missing.value or ""
            else:
                doc.metadata[field] = missing.value
        return True


class Quality(BaseFilter):
    """Drops rows whose `text` is outside the limits; the limit's name is the reason."""

    name = "filters"

    def __init__(self, settings: Filters, dropped: Dropped) -> None:
        """Args: settings: the limits. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.settings = settings

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the row stays, or the name of the limit that it breaks."""
        reason = None if doc.metadata["use"] == "benchmark" else broken_limit(doc.text, self.settings)
        return True if reason is None else (False, reason)


def broken_limit(text: str, limits: Filters) -> str | None:
    """Name of the first limit that the text breaks, if any."""
    words = text.split()
    solid = sum(map(len, words))
    if len(text) < limits.min_chars:
        return "min_chars"
    if len(text) > limits.max_chars:
        return "max_chars"
    if len(words) < limits.min_words:
        return "min_words"
    if limits.min_alpha and sum(c.isalpha() for c in text) < limits.min_alpha * solid:
        return "min_alpha"
    if limits.max_repetition < 1 and len(words) >= 10:
        most = Counter(word.casefold() for word in words).most_common(1)[0][1]
        if most > limits.max_repetition * len(words):
            return "max_repetition"
    return None


class PersonalData(BaseFilter):
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

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the row stays; redacts it."""
        if self.settings.action == "drop" and doc.metadata["use"] != "benchmark":
            for text in (doc.text, doc.metadata["completion"]):
                if spans := find(text, self.settings.kinds, self.settings.phone_regions):
                    return False, f"pii:{spans[0].kind}"
        row = redacted(to_row(doc), self.settings)
        if doc.metadata["use"] != "benchmark":
            for kind, mark in ((kind, f"<{kind.upper()}>") for kind in self.settings.kinds):
                self.redacted[kind] += sum(row[f].count(mark) for f in ("text", "completion")) - doc.text.count(mark) - doc.metadata["completion"].count(mark)
        doc.text, doc.metadata = row["text"], {name: row[name] for name in doc.metadata}
        return True


class WriteRuns(PipelineStep):
    """Keeps the cleaned rows in runs sorted by (use, source, id); hands the benchmark rows on."""

    type = "WRITER"
    name = "runs"

    def __init__(self, folder: Path) -> None:
        """Args: folder: takes the runs."""
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write all rows but benchmark rows, which go on down the pipeline."""
        runs = Runs(self.folder, f"{rank:05d}", by=key)
        for document in data:
            if document.metadata["use"] == "benchmark":
                yield document
            else:
                runs.add(to_row(document))
        runs.close()
