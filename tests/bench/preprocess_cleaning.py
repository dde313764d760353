"""What the two scripts of the preprocess benchmark have in common: the settings, and cleaning one text as one would write it."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import unicodedata

import ftfy
from phonenumbers import Leniency, PhoneNumberMatcher
from stdnum import iban, luhn

NGRAM, BUCKETS, HASHES = 5, 14, 8
DECONTAMINATE, OVERLAP = 8, 0.5
VALIDATION = 0.05
MAX_CHARS = 20_000
REGIONS = ("US", "GB", "DE", None)

EMAIL = re.compile(r"[\w.%+'-]+@(?:[\w-]+\.)+[^\W\d_]{2,24}")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
CARD = re.compile(r"\b[2-6](?:[ -]?\d){12,18}\b")
IP = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b|\b[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}\b")
DIGITS = re.compile(r"\d(?:\D{0,4}\d){6}")


def normalise(text: str) -> str:
    """Repair, NFC, and blanks."""
    text = unicodedata.normalize("NFC", ftfy.fix_text(text, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def checked_ip(match: re.Match[str]) -> str:
    """The mark where it is an address."""
    try:
        ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]
    return "<IP>"


def redact_numbers(text: str) -> str:
    """Write over bank accounts, cards and telephone numbers; texts with fewer than seven digits have none."""
    if not DIGITS.search(text):
        return text
    text = IBAN.sub(lambda match: "<IBAN>" if iban.is_valid(match[0]) else match[0], text)
    text = CARD.sub(lambda match: "<CARD>" if luhn.is_valid(re.sub("[ -]", "", match[0])) else match[0], text)
    for region in REGIONS:
        for match in reversed(list(PhoneNumberMatcher(text, region, Leniency.VALID))):
            text = f"{text[: match.start]}<PHONE>{text[match.end :]}"
    return text


def redact(text: str) -> str:
    """Write over personal data of all kinds."""
    return redact_numbers(IP.sub(checked_ip, EMAIL.sub("<EMAIL>", text)))


def messages(text: str, completion: str) -> list[dict[str, str]]:
    """The row as a conversation."""
    return [{"role": "user", "content": text}, {"role": "assistant", "content": completion}]


def trains(source: str, id: str) -> bool:
    """Whether the row is on the training side, by the hash of its key."""
    return int.from_bytes(hashlib.sha256(f"{source}/{id}".encode()).digest()[:8]) / 2**64 >= VALIDATION
