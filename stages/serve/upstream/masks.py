"""Personal data out of what leaves, and back into what comes: `<EMAIL_1>` in the place of an address, the same one for the same address.

A placeholder that a text holds already is given to nobody, so that what a user wrote out himself stays what it is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pydantic import JsonValue

from conf.schema import PiiKind
from stages.pii import rewrite

PLACEHOLDER = re.compile(r"<[A-Z_]+_[0-9]+>")


class Masks:
    """The placeholders of one request."""

    def __init__(self, body: JsonValue, kinds: Sequence[PiiKind], regions: Sequence[str], *, quoted: bool = False) -> None:
        """Args: body: what will leave. kinds, regions: as of `pii.find`. quoted: the answer is JSON, and what is put back stands in its strings."""
        self._kinds, self._regions, self._quoted = kinds, regions, quoted
        self._taken = {found for text in strings(body) for found in PLACEHOLDER.findall(text)}
        self._placeholders: dict[tuple[PiiKind, str], str] = {}
        self._numbers = Counter[str]()
        self._values: dict[str, str] = {}

    def hide(self, body: JsonValue) -> JsonValue:
        """The body with placeholders in its strings, keys of objects included."""
        if isinstance(body, str):
            return rewrite(body, self._kinds, self._regions, self._placeholder)
        if isinstance(body, list):
            return [self.hide(item) for item in body]
        if isinstance(body, dict):
            return {str(self.hide(key)): self.hide(value) for key, value in body.items()}
        return body

    def _placeholder(self, kind: PiiKind, value: str) -> str:
        if (kind, value) not in self._placeholders:
            self._numbers[kind] += 1
            while (name := f"<{kind.upper()}_{self._numbers[kind]}>") in self._taken:
                self._numbers[kind] += 1
            self._placeholders[kind, value], self._values[name] = name, value
        return self._placeholders[kind, value]

    def counts(self) -> dict[str, int]:
        """Kind -> how many different pieces of personal data were hidden."""
        return dict(Counter(kind for kind, _ in self._placeholders))

    def show(self, text: str) -> str:
        """The text with the personal data put back."""
        return PLACEHOLDER.sub(lambda match: self._value(match[0]), text)

    def _value(self, placeholder: str) -> str:
        value = self._values.get(placeholder, placeholder)
        return json.dumps(value, ensure_ascii=False)[1:-1] if self._quoted else value

    def begun(self, text: str) -> int:
        """How many characters at the end may be the beginning of a placeholder."""
        at = text.rfind("<")
        return len(text) - at if at >= 0 and any(name.startswith(text[at:]) for name in self._values if name != text[at:]) else 0


class Unmasked:
    """One answer as it comes in pieces."""

    def __init__(self, masks: Masks) -> None:
        """Args: masks: of its request."""
        self._masks, self._held = masks, ""

    def push(self, piece: str) -> str:
        """Take a piece; returns the text that is now certain, which may be empty."""
        text = self._held + piece
        held = self._masks.begun(text)
        self._held = text[len(text) - held :]
        return self._masks.show(text[: len(text) - held])

    def finish(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text


def strings(body: JsonValue) -> Iterator[str]:
    """All of them, keys included."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, list):
        for item in body:
            yield from strings(item)
    elif isinstance(body, dict):
        for key, value in body.items():
            yield key
            yield from strings(value)
