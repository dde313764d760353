"""Which side a row is on: by the hash of a stable key, so that it never changes side when others come or go."""

from __future__ import annotations

import hashlib

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from conf.schema import Split

SPLITS = ("train", "validation", "test")


def side(key: str, settings: Split) -> str:
    """`train`, `validation` or `test`: where the key's hash, as a number in [0, 1), falls."""
    number = int.from_bytes(hashlib.sha256(f"{settings.salt}\0{key}".encode()).digest()[:8]) / 2**64
    if number < settings.test:
        return "test"
    return "validation" if number < settings.test + settings.validation else "train"


def split_key(source: str, id: str, group: str, settings: Split) -> str:
    """What is hashed: the group, where rows keep together by it and this one has any, else `source/id`."""
    return f"group\0{group}" if settings.by == "group" and group else f"{source}/{id}"


class AssignSplit(PipelineStep):
    """Writes the side of each row into its metadata, under `split`; rows of `use: test` and `corpus` are on their own."""

    type = "SPLIT"
    name = "split"

    def __init__(self, settings: Split) -> None:
        """Args: settings: shares, key and salt."""
        super().__init__()
        self.settings = settings

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents with their split."""
        for document in data:
            use = document.metadata["use"]
            key = split_key(document.metadata["source"], document.id, document.metadata["group"], self.settings)
            document.metadata["split"] = side(key, self.settings) if use == "train" else use
            yield document
