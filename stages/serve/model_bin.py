"""The file model.bin that ctranslate2 opens, as its `specs/model_spec.py` writes it: names, types, shapes and bytes."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 6
"""Of the format that is read here."""
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2", 5: "<u2"}
"""ctranslate2's number of a type -> numpy's name; bfloat16, which numpy does not have, as uint16."""


class Variable(NamedTuple):
    """Where one of them lies."""

    name: str
    kind: int
    """Number of its type."""
    shape: tuple[int, ...]
    start: int
    """Its first byte."""
    end: int


class Reader:
    """Takes numbers and texts out of bytes, one after another."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        """Begin at the first byte."""
        self.data, self.at = data, 0

    def take(self, form: str) -> int:
        """A number, in a form of `struct`."""
        value: int = struct.unpack_from(f"<{form}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        """A text that ends with a zero byte, its length before it."""
        length = self.take("H")
        self.at += length
        return self.data[self.at - length : self.at - 1].decode()

    def variables(self) -> Iterator[Variable]:
        """Every one; none of a version that is not known."""
        if self.take("I") != VERSION:
            return
        self.text()
        self.take("I")
        for _ in range(self.take("I")):
            name = self.text()
            shape = tuple(self.take("I") for _ in range(self.take("B")))
            kind, length = self.take("B"), self.take("I")
            yield Variable(name, kind, shape, self.at, self.at + length)
            self.at += length

    def aliases(self) -> Iterator[tuple[str, str]]:
        """After the variables: another name of one -> its name."""
        for _ in range(self.take("I")):
            alias = self.text()
            yield alias, self.text()


def variables(data: bytes) -> Iterator[Variable]:
    """Every variable of a model.bin; none of a version that is not known."""
    return Reader(data).variables()


def tensors(file: Path) -> dict[str, NDArray[Any]]:
    """Every variable under each of its names, mapped and not read.

    Raises:
        ModelError: the file is cut short, or of another version.
    """
    import numpy as np

    try:
        with file.open("rb") as opened:
            reader = Reader(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))  # a ValueError where it is empty
        found = {
            one.name: np.frombuffer(reader.data, TYPES[one.kind], count=(one.end - one.start) // np.dtype(TYPES[one.kind]).itemsize, offset=one.start)
            .reshape(one.shape)
            for one in reader.variables()
        }  # fmt: skip
        if not found:
            raise ModelError(f"{file} is of another version than {VERSION} of ctranslate2's format", "run `dvc repro export`")
        found |= {alias: found[name] for alias, name in reader.aliases()}
    except (struct.error, ValueError, LookupError) as error:
        raise ModelError(f"{file} is cut short or damaged: {error}", "remove it and run `dvc repro export`, or `dvc pull`") from error
    return found
