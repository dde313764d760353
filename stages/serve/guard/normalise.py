"""The text as rules and classifier read it, whatever it was disguised as.

`normalise` gives one plain form; `views` gives it and what else may be hidden in the text: letters spaced out or written as digits, payloads in
base64, hexadecimal, percent signs, rot13 or invisible tag characters. A view is only a further reading: the text itself is never changed.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import itertools
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from urllib.parse import unquote_to_bytes

INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
TAGS = re.compile(r"[\U000e0020-\U000e007e]+")
WORD = re.compile(r"[^\W\d_]+")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
HEX = re.compile(r"(?:(?:0x|\\x)?[0-9a-fA-F]{2}[\s:,]?){8,}")
SPACED = re.compile(r"(?<![^\W_])[^\W_](?:[\s.\-_*|/]{1,5}[^\W_](?![^\W_])){4,}")
LEET = str.maketrans("0134578@$!|", "oieastbasii")
LEET_WORD = 24
"""Longest word that is read as leetspeak: longer ones are codes."""
FREQUENT = frozenset(["the", "and", "you", "your", "to", "of", "all", "is", "in", "for", "me", "my", "that", "this", "with", "not", "are", "be", "it", "on"])
"""English words by which rot13 is told from other text."""
DEPTH = 2
"""A payload may hold a payload; one in that one is not opened."""
MOST_VIEWS = 16
MOST_CHARACTERS = 20_000
"""Of all decoded payloads together: the rest is not opened."""


@cache
def twins() -> dict[int, int]:
    """Letters of other scripts that look like a Latin one -> that one, from Unicode's table of confusables (UTS 39)."""
    from confusable_homoglyphs.confusables import confusables_data

    found = {}
    for letter, others in confusables_data.items():
        plain = [other["c"].lower() for other in others if len(other["c"]) == 1 and other["c"].isascii() and other["c"].isalpha()]
        if plain and len(letter) == 1 and letter.isalpha() and not letter.isascii() and letter == letter.casefold():
            found[ord(letter)] = ord(plain[0])
    return found


def latin(text: str) -> str:
    """Look-alikes as the Latin letters that they pose for.

    In a word that mixes them with Latin letters, all; in a word of look-alikes alone, where the text has no other letter of that script, or
    honest Greek and Russian would be spoiled.
    """
    if text.isascii():
        return text
    table = twins()
    honest = {script(c) for c in set(text) if c.isalpha() and not c.isascii() and ord(c) not in table}

    def one(found: re.Match[str]) -> str:
        word = found[0]
        if word.isascii() or not any(ord(c) in table for c in word):
            return word
        poses = any(c.isascii() for c in word) or not any(script(c) in honest for c in word if ord(c) in table)
        return word.translate(table) if poses else word

    return WORD.sub(one, text)


@cache
def script(letter: str) -> str:
    """First word of a letter's Unicode name: LATIN, CYRILLIC, GREEK, …"""
    return unicodedata.name(letter, "").partition(" ")[0]


def normalise(text: str) -> str:
    """The text as rules and classifier read it: `plain`, with Latin for look-alikes."""
    return latin(plain(text))


def plain(text: str) -> str:
    """NFKC, no invisible characters or accents, case-folded, single blanks."""
    if text.isascii():
        return " ".join(text.casefold().split())
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()
    return " ".join("".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).split())


class Views(list[str]):
    """Normalised readings of a text: itself first, then what is hidden in it; no two equal, at most `MOST_VIEWS`."""

    unread = False
    """More is hidden in it than is read."""


def views(text: str) -> Views:
    """Read a text in every way. What it says itself comes before any payload, which may be there to take its place."""
    found = dict.fromkeys([normalise(text)])
    todo, left, unread = [(text, 0)], MOST_CHARACTERS, False
    while todo and not unread:
        source, depth = todo.pop(0)
        hidden = dict.fromkeys(payloads(source) if depth < DEPTH else ())  # one that stands there often takes one place
        for view in itertools.chain(rewritings(source), map(normalise, hidden)):
            unread = unread or (view not in found and len(found) >= MOST_VIEWS)
            if not unread:
                found[view] = None
        todo += [(payload, depth + 1) for payload in hidden]
        unread = unread or (left := left - sum(map(len, hidden))) < 0
    read = Views(view for view in found if view) or Views([""])
    read.unread = unread
    return read


def rewritings(text: str) -> Iterator[str]:
    """A text without spaced-out letters, and with letters for the digits and signs of leetspeak, where it has any; normalised."""
    joined = normalise(SPACED.sub(lambda found: rejoin(found[0]), text))
    yield joined
    words = joined.split()
    written_so = sum(map(is_leet, words)) > 1  # then `4` is a word and `4c7` too
    yield " ".join(word.translate(LEET) if is_leet(word) or (written_so and is_short_or_mixed(word)) else word for word in words)


def rejoin(spaced: str) -> str:
    """Letters with gaps between them as words: where there are gaps of two kinds, the blanks or else the widest part words."""
    gaps = re.findall(r"[\W_]+", spaced)
    widest = max(map(len, gaps))
    if any(gap.isspace() for gap in gaps) and not all(gap.isspace() for gap in gaps):
        words = spaced.split()
    else:
        words = re.split(rf"[\W_]{{{widest}}}", spaced) if widest > min(map(len, gaps)) else [spaced]
    return " ".join(re.sub(r"[\W_]+", "", word) for word in words)


def is_leet(word: str) -> bool:
    """Whether a word mixes letters with at most as many digits or signs that stand for letters; `k-77120` and `1000` do not."""
    signs = sum(ord(c) in LEET for c in word)
    return 3 <= len(word) <= LEET_WORD and 0 < signs <= sum(c.isalpha() for c in word)


def is_short_or_mixed(word: str) -> bool:
    """Whether a word may be leetspeak among others that are: one sign or two, or signs and letters in any proportion."""
    return len(word) <= 2 or (len(word) <= LEET_WORD and any(c.isalpha() for c in word))


def payloads(text: str) -> Iterator[str]:
    """What is encoded in a text and reads like a text."""
    if not text.isascii() and (tags := "".join(TAGS.findall(text))):
        yield "".join(chr(ord(c) - 0xE0000) for c in tags)
    if text.count("%") >= 3:
        for word in text.split():
            if word.count("%") >= 3:
                yield from readable(unquote_to_bytes(word.replace("+", " ")))
    for found in HEX.findall(text):
        digits = re.sub(r"0x|\\x|[\s:,]", "", found)
        yield from readable(bytes.fromhex(digits[: len(digits) // 2 * 2]))
    for found in BASE64.findall(text):
        try:
            bare = found.rstrip("=").translate(str.maketrans("-_", "+/"))
            yield from readable(base64.b64decode(bare[: len(bare) - (len(bare) % 4 == 1)] + "=" * (-len(bare) % 4)))
        except (binascii.Error, ValueError):
            continue
    turned = codecs.decode(text, "rot13")
    if frequent(turned) > max(2, 2 * frequent(text)):
        yield turned


def readable(found: bytes) -> Iterator[str]:
    """The bytes as a text, if they are one: UTF-8, and hardly anything but letters, digits, blanks and common signs."""
    try:
        text = found.decode()
    except UnicodeDecodeError:
        return
    if len(text) >= 8 and sum(c.isalnum() or c.isspace() or c in ".,;:!?'\"-_/()%=+<>{}[]#@&*" for c in text) >= 0.95 * len(text):
        yield text


def frequent(text: str) -> int:
    """How many words of a text are frequent English ones."""
    return sum(word in FREQUENT for word in re.findall(r"[a-z]+", text.casefold()))
