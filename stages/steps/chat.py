"""Rows as conversations: sandboxed Jinja over the record's fields, and the writer of the splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.nodes import Name, Output, TemplateData
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conf.errors import ConfigError
from conf.schema import Chat
from stages.records import Message
from stages.steps.rows import SCRATCH, Dropped, Filter, Row, publishable, to_row
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


def pieces(template: str) -> list[tuple[bool, str]] | None:
    """A template of nothing but text and fields that are texts, as (is a field, text or its name); None for any other."""
    found: list[tuple[bool, str]] = []
    for output in ImmutableSandboxedEnvironment().parse(template).body:
        for node in output.iter_child_nodes():
            if isinstance(output, Output) and isinstance(node, TemplateData):
                found.append((False, node.data))
            elif isinstance(output, Output) and isinstance(node, Name) and node.name in FIELDS[:-1]:
                found.append((True, node.name))
            else:
                return None
    return found


class FormatChat(Filter):
    """Fills `messages` and `completion`; a row with an empty side is dropped with `chat:prompt` or `chat:completion`."""

    name = "chat"

    def __init__(self, settings: Chat, dropped: Dropped) -> None:
        """Args: settings: the templates. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.settings = settings
        self.templates: dict[str, Template] = {}
        self.pieces = {key: pieces(getattr(settings, key)) for key in ("prompt", "completion")}

    def render(self, key: str, row: Row) -> str:
        """One side of the conversation.

        Raises:
            ConfigError: the template names a field that the row does not have, or does what the sandbox forbids.
        """
        if (simple := self.pieces[key]) is not None:  # what Jinja would do, at a tenth of the time
            return "".join([row[text] if is_field else text for is_field, text in simple])
        if not self.templates:  # compiled templates do not travel between processes
            self.templates = {k: compile_template(getattr(self.settings, k), k) for k in ("prompt", "completion")}
        try:
            return self.templates[key].render({field: row[field] for field in FIELDS})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # the others: of what it does to a value
            raise ConfigError(f"preprocess.chat.{key} fails on {row['source']}/{row['id']}: {error}", f"its fields are {', '.join(FIELDS)}") from error

    def reason(self, doc: Document) -> str | None:
        """Which side of the conversation is empty."""
        if doc.metadata["split"] == "corpus":
            return None
        row = to_row(doc)
        prompt, completion = self.render("prompt", row), self.render("completion", row)
        for side, text in (("prompt", prompt), ("completion", completion)):
            if not text.strip():
                return f"chat:{side}"
        system = [Message(role="system", content=self.settings.system)] if self.settings.system else []
        doc.metadata["messages"] = [*system, Message(role="user", content=prompt), Message(role="assistant", content=completion)]
        doc.metadata["completion"] = completion
        return None


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
        files: dict[str, BinaryIO] = {}
        kept: dict[str, Counter[str]] = defaultdict(Counter)
        with ExitStack() as stack:
            for document in data:
                row = to_row(document)
                split = row["split"]
                if split not in files:
                    path = self.folder / split / f"{rank:05d}.jsonl"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files[split] = stack.enter_context(path.open("wb"))
                for name in SCRATCH:
                    del row[name]
                kept[split][row["source"]] += 1
                files[split].write(publishable(row))
        write_tally(self.counts, rank, kept)
        yield from ()
