"""The text as rules and classifier read it, whatever it was disguised as."""

from __future__ import annotations

import re
import unicodedata

INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
LOOKALIKES = str.maketrans("аеорсухіјѕԁһӏɡαερουντικ", "aeopcyxijsdhlgaepouvtik")  # Cyrillic and Greek twins


def normalise(text: str) -> str:
    """The text as rules and classifier read it: NFKC, no invisible characters or accents, case-folded, Latin for look-alikes, single blanks."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold().translate(LOOKALIKES)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(text.split())
