"""Values of any source as plain JSON: text that every later stage can write, numbers that are numbers."""

from __future__ import annotations

import datetime
import decimal
import math
import re
import uuid

from conf.errors import DataError
from stages.files import canonical

DEEPEST = 100
"""Lists and objects within each other that a value may have: every later stage walks them."""
UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def plain(value: object, where: str, depth: int = 0) -> object:
    """The value as JSON knows it: NaN is null, dates are ISO 8601, decimals and UUIDs are text.

    Raises:
        DataError: it is nested too deep; NUL or half a surrogate pair in a text, an infinite number, bytes, or a type without a text form.
    """
    if depth > DEEPEST:
        raise DataError(f"{where}: lists or objects nested more than {DEEPEST} deep", "this is no row: check `format` and `rows_at`, or flatten the source")
    match value:
        case None | bool() | int():
            return value
        case str():
            found = UNWRITABLE.search(value)
            if found:
                what = "a NUL character" if found[0] == "\0" else f"half a surrogate pair (U+{ord(found[0]):04X})"
                raise DataError(f"{where}: {what} at character {found.start()}", "the source is damaged, or it is no text: mend it")
            return value
        case float():
            if math.isinf(value):
                raise DataError(f"{where}: {value} is no number", "mend the source")
            return None if math.isnan(value) else value
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | uuid.UUID() | datetime.timedelta():
            return str(value)
        case dict():
            return {str(plain(str(key), where)): plain(item, where, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [plain(item, where, depth + 1) for item in value]
    raise DataError(f"{where}: a value of type {type(value).__name__} is no text", "leave the column out of the source, or store it as text")


def as_text(value: object) -> str:
    """A plain value as the text of a field: null is empty, lists and objects are JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else canonical(value, indent=None).rstrip("\n")
