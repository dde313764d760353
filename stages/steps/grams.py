"""Words of a text and hashes of its n-grams, for many texts at a time in numpy.

Two kinds of hash: sha1 of the words with blanks between them, which datatrove's MinHash takes too and which decides what a near duplicate is; and
for comparing n-grams alone, a sum of the words' 64-bit hashes by odd factors, which is an array operation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha1
from itertools import chain
from unicodedata import category, normalize

import numpy as np
from datatrove.utils.text import PUNCTUATION, TextNormConfig, simplify_text

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, kana and Han: scripts without blanks between words."""
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
NUMBER = re.compile(rb"[0-9]+(?:[.,][0-9]+)?")
WITH_ACCENTS = TextNormConfig(norm_unicode_diacritics=False)
PLAIN = bytes(32 if chr(code) in PUNCTUATION else ord(chr(code).lower()) if code < 128 else code for code in range(256))
"""ASCII without case and punctuation."""
KNOWN_WORDS = 200_000
"""Words whose hash is kept."""
SHA1 = np.dtype([("hash", "<u8"), ("rest", "V12")])


def words(text: str) -> list[bytes]:
    """Words in UTF-8 without case, punctuation and accents, numbers made equal; one per character in scripts without blanks.

    They are those of datatrove's `simplify_text`, which looks up the category of each character; ASCII takes a shorter way still.
    """
    if text.isascii():
        return NUMBER.sub(b"0", text.encode()).translate(PLAIN).split()
    simple = normalize("NFD", simplify_text(text, WITH_ACCENTS))
    for accent in [c for c in set(simple) if category(c) == "Mn"]:
        simple = simple.replace(accent, "")
    return [word.encode() for word in WORD.findall(simple)]


def grams(tokens: Sequence[bytes], size: int) -> list[bytes]:
    """N-grams of words; a text shorter than `size` words is one, an empty one none."""
    if len(tokens) <= size:
        return [b" ".join(tokens)] if tokens else []
    return list(map(b" ".join, zip(*(tokens[at:] for at in range(size)), strict=False)))


def sha1_hashes(texts: Sequence[Sequence[bytes]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sha1 hashes, shape (n,), of the n-grams of many texts one after the other, and how many each text has."""
    each = [grams(tokens, size) for tokens in texts]
    digests = b"".join([sha1(gram, usedforsecurity=False).digest() for gram in chain.from_iterable(each)])
    return np.ascontiguousarray(np.frombuffer(digests, dtype=SHA1)["hash"]), np.fromiter(map(len, each), dtype=np.int64)


class WordHashes(dict[bytes, bytes]):
    """64-bit hash of each word, kept for those seen lately."""

    def __missing__(self, word: bytes) -> bytes:
        """Hash a word for the first time."""
        if len(self) >= KNOWN_WORDS:
            self.clear()
        value = self[word] = sha1(word, usedforsecurity=False).digest()[:8]
        return value


def sum_hashes(texts: Sequence[Sequence[bytes]], size: int, known: WordHashes) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, shape (n,), of the n-grams of many texts one after the other, and how many each text has; like `sha1_hashes`, a short text is one."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    counts = np.where(lengths, np.maximum(lengths - size + 1, 1), 0)
    if not counts.sum():
        return np.zeros(0, dtype=np.uint64), counts
    padding = bytes(8 * size)  # after each text: a short one is one n-gram, and the last ones reach into it
    hashes = np.frombuffer(b"".join([value for tokens in texts for value in (*map(known.__getitem__, tokens), padding)]), dtype="<u8")
    sums = np.zeros(len(hashes) - size + 1, dtype=np.uint64)
    for at, factor in enumerate(odd_factors(size)):
        sums += hashes[at : at + len(sums)] * factor
    first = np.cumsum(lengths + size) - (lengths + size)
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return sums[np.repeat(first, counts) + inside], counts


def odd_factors(count: int) -> np.ndarray:
    """So many odd 64-bit numbers, always the same."""
    return np.random.RandomState(64).randint(0, 1 << 63, size=count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
