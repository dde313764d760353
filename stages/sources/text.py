"""A fetched file as text: decompressed, decoded and cut into lines, within limits, and every wrong byte named."""

from __future__ import annotations

import codecs
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from conf.errors import ConfigError, DataError
from conf.schema import Dataset

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
OTHERWISE_COMPRESSED = (".zst", ".lz4", ".br", ".7z", ".lzma", ".z")


@dataclass(frozen=True, kw_only=True)
class File:
    """A fetched file and how to read it."""

    path: Path
    """Where it lies here."""
    name: str
    """What it is called at its source: messages and `auto` go by it."""
    dataset: Dataset
    """What `conf/` says."""
    max_row_bytes: int
    """Longest row."""
    max_bytes: int
    """Most bytes, decompressed."""

    @property
    def mapping(self) -> dict[str, str]:
        """Record field -> column or selector."""
        return {str(field): column for field, column in self.dataset.fields.items()}

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open it, decompressed if its name ends in .gz, .bz2 or .xz.

        Raises:
            DataError: it cannot be decompressed.
            ConfigError: its name says that it is compressed in another way.
        """
        import fsspec

        compression = COMPRESSED.get(suffix := Path(self.name).suffix.lower())
        if suffix in OTHERWISE_COMPRESSED:
            raise ConfigError(f"{self.name}: {suffix} is not unpacked here", f"pack it anew as {', '.join(COMPRESSED)}, or unpack it")
        try:
            with fsspec.open(str(self.path), "rb", compression=compression) as stream:
                yield stream
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk; those of gzip and bz2 have no number
                raise
            raise DataError(f"{self.name}: cannot be decompressed: {error}", "the file is damaged or cut short") from error

    def decode(self, data: bytes, line: int, offset: int) -> str:
        """The text of some bytes; a wrong one stops the run and is named."""
        encoding = self.dataset.encoding
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            at_line = line + data[: error.start].count(b"\n")
            raise DataError(
                f"{self.name}:{at_line}: byte {offset + error.start} (0x{data[error.start]:02x}) is not {encoding}",
                "name the file's encoding in `encoding`, or mend the file",
            ) from error
        except (LookupError, UnicodeError) as error:  # of no codec, or of one that is for something else than texts (`idna`, `undefined`)
            raise ConfigError(f"{self.name}: encoding {encoding!r} is unknown: {error}", "name one that Python knows, as utf-8, latin-1 or cp1252") from error
        before, nul, _ = text.partition("\0")
        if nul:
            raise DataError(
                f"{self.name}:{line + before.count(chr(10))}: a NUL byte at byte {offset + len(before.encode(encoding))}",
                "this is no text: check `format` and `encoding`, or mend it",
            )
        return text.removeprefix("\ufeff") if offset == 0 else text

    def codec(self) -> str:
        """Python's own name of the encoding, which has several; empty: it is none, which `decode` tells."""
        try:
            return codecs.lookup(self.dataset.encoding).name
        except LookupError:
            return ""

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield number and text of each line, with its end."""
        if self.codec().startswith(("utf-16", "utf-32")):  # their line ends are not one byte
            yield from enumerate(io.StringIO(self.text(self.max_bytes), newline=""), 1)
            return
        offset = 0
        with self.open() as stream:
            for number, data in enumerate(iter(lambda: stream.readline(self.max_row_bytes + 1), b""), 1):
                if len(data) > self.max_row_bytes:
                    self.too_long(number)
                yield number, self.decode(data, number, offset)
                offset += len(data)
                if offset > self.max_bytes:
                    self.too_large()

    def text(self, most: int) -> str:
        """The whole text."""
        data = bytearray()
        with self.open() as stream:
            while chunk := stream.read(1 << 20):
                data += chunk
                if len(data) > most:
                    self.too_long(1) if most == self.max_row_bytes else self.too_large()
        return self.decode(bytes(data), 1, 0)

    def too_long(self, line: int) -> NoReturn:
        """Refuse a row."""
        raise DataError(f"{self.name}:{line}: a row longer than collect.max_row_bytes={self.max_row_bytes}", "probably a broken file; if not, raise the limit")

    def too_large(self) -> NoReturn:
        """Refuse a file."""
        raise DataError(f"{self.name}: more than collect.max_source_bytes={self.max_bytes} when decompressed", "raise the limit if the size is right")
