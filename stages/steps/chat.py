"""Rows as conversations: sandboxed Jinja over the record's fields, and the writer of the splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conf.errors import ConfigError
from conf.schema import Chat
from stages.files import canonical
from stages.records import Message
from stages.steps.rows import Dropped, to_row
from stages.steps.tally import write_tally

FIELDS = ("id", "text", "completion", "label", "group", "meta")


def compile_template(template: str, key: str) -> Template:
    """A template that can neither change nor call anything.

    Raises:
        ConfigError: it is no Jinja.
    """
    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template)
    except TemplateError as error:
        raise ConfigError(f"preprocess.chat.{key}={template!r} is no Jinja template: {error}") from error


class FormatChat(BaseFilter):
    """Fills `messages` and `completion`; a row with an empty side is dropped with `chat:prompt` or `chat:completion`."""

    name = "chat"

    def __init__(self, settings: Chat, dropped: Dropped) -> None:
        """Args: settings: the templates. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.settings = settings
        self.templates: dict[str, Template] = {}

    def render(self, key: str, doc: Document) -> str:
        """One side of the conversation.

        Raises:
            ConfigError: the template names a field that the row does not have, or does what the sandbox forbids.
        """
        if not self.templates:  # compiled templates do not travel between processes
            self.templates = {k: compile_template(getattr(self.settings, k), k) for k in ("prompt", "completion")}
        row = to_row(doc)
        try:
            return self.templates[key].render({field: row[field] for field in FIELDS})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # the others: of what it does to a value
            raise ConfigError(f"preprocess.chat.{key} fails on {row['source']}/{row['id']}: {error}", f"its fields are {', '.join(FIELDS)}") from error

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the row makes a conversation."""
        if doc.metadata["split"] == "corpus":
            return True
        prompt, completion = self.render("prompt", doc), self.render("completion", doc)
        for side, text in (("prompt", prompt), ("completion", completion)):
            if not text.strip():
                return False, f"chat:{side}"
        system = [Message(role="system", content=self.settings.system)] if self.settings.system else []
        doc.metadata["messages"] = [*system, Message(role="user", content=prompt), Message(role="assistant", content=completion)]
        doc.metadata["completion"] = completion
        return True


class WriteSplits(PipelineStep):
    """Writes each row into `<folder>/<split>/<part>.jsonl`."""

    type = "WRITER"
    name = "splits"

    def __init__(self, folder: Path, counts: Path) -> None:
        """Args: folder: takes one folder per split. counts: takes the tally of rows per split and source."""
        super().__init__()
        self.folder, self.counts = folder, counts

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write all rows; none goes on."""
        files: dict[str, TextIO] = {}
        kept: dict[str, Counter[str]] = defaultdict(Counter)
        with ExitStack() as stack:
            for document in data:
                row = to_row(document)
                split = row.pop("split")
                if split not in files:
                    path = self.folder / split / f"{rank:05d}.jsonl"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files[split] = stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                row.pop("use")
                kept[split][row["source"]] += 1
                files[split].write(canonical(row, indent=None))
        write_tally(self.counts, rank, kept)
        yield from ()
