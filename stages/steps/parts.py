"""Parts: slices of all rows in order, `<folder>/00000.jsonl` and so on, one per task."""

from __future__ import annotations

from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from stages.files import read_jsonl
from stages.steps.rows import to_row, write_run


class ReadPart(PipelineStep):
    """Reads the part of its rank."""

    type = "READER"
    name = "part"

    def __init__(self, folder: Path) -> None:
        """Args: folder: of `00000.jsonl` and so on."""
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield documents."""
        if data:
            yield from data
        for row in read_jsonl(self.folder / f"{rank:05d}.jsonl"):
            yield Document(text=row.pop("text"), id=row.pop("id"), metadata={k: v for k, v in row.items() if k != "messages"})


class WriteParts(PipelineStep):
    """Writes the part of its rank; none goes on."""

    type = "WRITER"
    name = "part"

    def __init__(self, folder: Path) -> None:
        """Args: folder: takes `00000.jsonl` and so on."""
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write all documents."""
        write_run(self.folder / f"{rank:05d}.jsonl", map(to_row, data))
        yield from ()
