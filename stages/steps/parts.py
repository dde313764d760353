"""Parts: slices of all rows in order, `<folder>/00000.jsonl` and so on, one per task."""

from __future__ import annotations

from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from stages.steps.rows import decode, read_lines


class ReadPart(PipelineStep):
    """Reads the part of its rank; a row's place in it goes with it as `index`."""

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
        for index, line in enumerate(read_lines(self.folder / f"{rank:05d}.jsonl")):
            row = decode(line)
            row["index"] = index
            yield Document(text=row.pop("text"), id=row.pop("id"), metadata=row)
