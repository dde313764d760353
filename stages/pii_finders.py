"""The finders of personal data: one per kind, from a text to the places where it stands.

Each takes time that grows with the text and no faster: a pattern begins anew behind what it looked at, and what it takes in has a bound.
No find reaches over the end of a line.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module

from conf.schema import PiiKind

LOCAL = r"(?:(?<![\w.%+'-])[\w.%+'-]{1,64}|(?<![A-Za-z0-9_.%+'-])[A-Za-z0-9_.%+'-]{1,64})"
"""Before the @; in a script without blanks, the Latin letters there."""
EMAIL = re.compile(rf"{LOCAL}@(?:[\w-]{{1,63}}\.){{1,8}}(?:[A-Za-z]{{2,24}}(?![A-Za-z0-9-])|[^\W\d_]{{2,24}}(?![\w-]))")
URL = re.compile(r"(?<![A-Za-z0-9])(?:[a-z][a-z0-9+]{1,15}://|www\.)[^\s<>\"']*[^\s<>\"'.,;:!?)\]]", re.IGNORECASE)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ \u00a0-]?[A-Za-z0-9]){11,30}")
CARD = re.compile(r"(?<![A-Za-z0-9])[2-6](?:[ .\u00a0-]?[0-9]){12,18}(?![0-9])")
IPV4 = re.compile(r"(?<![A-Za-z0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![A-Za-z0-9]|\.[0-9])")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,37}(?:(?:\.[0-9]{1,3}){3})?(?![\w:])")
BITCOIN = re.compile(r"(?<![A-Za-z0-9])(?:[13][1-9A-HJ-NP-Za-km-z]{25,34}|bc1[02-9ac-hj-np-z]{11,71})(?![A-Za-z0-9])")
NUMBER_BEFORE = re.compile(r"[0-9][ .\u00a0-]$")
AS_ON_A_CARD = re.compile(r"[0-9]{15,16}|[0-9]{4}([ .\u00a0-])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{6}\1[0-9]{5})")
TAPROOT = re.compile(r"bc1p[02-9ac-hj-np-z]{58}")
DECIMAL, PREFIX = re.compile(r"\d{1,2}\.\d+"), re.compile(r"[A-Z0-9]-")
BLANK = r"[ \u00a0./-]"
"""Between groups of digits."""
PHONE = re.compile(r"\d(?:[^\w\n]{0,4}\d){6}")


def grouped(digits: int, first: str = "[0-9]", last: str = "[0-9]") -> str:
    """Pattern of a number written in groups: so many digits with a blank, dot, slash or hyphen between them or not."""
    return rf"{first}(?:{BLANK}?[0-9]){{{digits - 2}}}{BLANK}?{last}"


NATIONAL: dict[str, tuple[tuple[str, str], ...]] = {
    "BE": (("be.nn", grouped(11)),),
    "BR": (("br.cpf", grouped(11)),),
    "CA": (("ca.sin", grouped(9)),),
    "CH": (("ch.ssn", grouped(13, first="7")),),
    "DE": (("de.idnr", grouped(11, first="[1-9]")),),
    "ES": (("es.dni", grouped(9, last="[A-Za-z]")), ("es.nie", grouped(9, first="[XYZxyz]", last="[A-Za-z]"))),
    "FI": (("fi.hetu", r"[0-9]{6}[-+A-FU-Y][0-9]{3}[0-9A-Y]"),),
    "FR": (("fr.nir", grouped(15, first="[12]")),),
    "IN": (("in_.aadhaar", grouped(12, first="[2-9]")),),
    "IT": (("it.codicefiscale", r"[A-Za-z]{6}[0-9]{2}[A-Za-z][0-9]{2}[A-Za-z][0-9]{3}[A-Za-z]"),),
    "KR": (("kr.rrn", grouped(13)),),
    "NL": (("nl.bsn", grouped(9)),),
    "NO": (("no.fodselsnummer", grouped(11)),),
    "PL": (("pl.pesel", grouped(11)),),
    "SE": (("se.personnummer", r"(?:[0-9]{2})?[0-9]{6}[-+]?[0-9]{4}"),),
    "TR": (("tr.tckimlik", grouped(11, first="[1-9]")),),
    "ZA": (("za.idnr", grouped(13)),),
}
"""Region -> (module of stdnum, pattern) of the numbers that identify a person there."""


def has_url(text: str) -> bool:
    """Whether there may be an address of the web."""
    return "://" in text or "www." in text.lower()


def ascii_digits(text: str) -> int:
    """How many there are."""
    data = text.encode(errors="replace")
    return len(data) - len(data.translate(None, b"0123456789"))


@lru_cache(maxsize=64)
def checker(module: str) -> Callable[[str], bool]:
    """`is_valid` of a module of stdnum: form, components and check digits."""
    valid: Callable[[str], bool] = import_module(f"stdnum.{module}").is_valid
    return valid


def checked(pattern: re.Pattern[str] | str, module: str, text: str) -> Iterator[tuple[int, int]]:
    """Where the pattern stands alone and stdnum says that the number is right."""
    if isinstance(pattern, str):
        pattern = re.compile(rf"(?<![\w+])(?<![0-9]{BLANK}){pattern}(?!\w)")
    yield from (match.span() for match in pattern.finditer(text) if checker(module)(re.sub("[ \u00a0./]", "", match[0])))


def emails(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Addresses of the usual form, in any script."""
    if "@" in text:
        yield from (match.span() for match in EMAIL.finditer(text))


def urls(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Addresses with a scheme, or starting with `www.`."""
    if has_url(text):
        for match in URL.finditer(text):
            closes = text[match.end() : match.end() + 1] == ")" and match[0].count("(") > match[0].count(")")
            yield match.start(), match.end() + closes


def ibans(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Numbers with the form of their country and the right check digits (mod 97); words that follow are left alone."""
    return longest(IBAN, text, lambda _, number, __: number[-1].isalnum() and checker("iban")(number.replace("\u00a0", "")))


def cards(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Numbers of 13 to 19 digits in the payment networks' ranges with the right check digit (Luhn).

    Of what has more groups of digits behind it, an expiry date say, the first 15 or 16 digits count too; and behind another number,
    a quantity say, a number of 15 or 16 digits that is written as on a card.
    """

    def right(before: str, number: str, rest: str) -> bool:
        digits = re.sub("[ .\u00a0-]", "", number)
        if NUMBER_BEFORE.search(before) and not (AS_ON_A_CARD.fullmatch(number) and len(digits) in (15, 16)):
            return False
        return number[-1].isdigit() and (not rest or (len(digits) in (15, 16) and not rest[0].isdigit())) and checker("luhn")(digits)

    if ascii_digits(text) >= 13:
        yield from longest(CARD, text, right)


def longest(pattern: re.Pattern[str], text: str, right: Callable[[str, str, str], bool]) -> Iterator[tuple[int, int]]:
    """Of each match the longest beginning that is right; where there is none, the next match may begin inside it.

    Args:
        right: whether a beginning of a match is, given the two characters before it, and the rest of it.
    """
    at = 0
    while match := pattern.search(text, at):
        found, start = match[0], match.start()
        size = next((size for size in range(len(found), 12, -1) if right(text[max(start - 2, 0) : start], found[:size], found[size:])), 0)
        at = start + (size or 1)
        if size:
            yield start, at


def addresses(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """IPv6 and IPv4 addresses with a digit in them: not the bare `::`, and not `C::D`."""
    for pattern, mark, least in ((IPV6, ":", 2), (IPV4, ".", 3)):
        for match in pattern.finditer(text) if text.count(mark) >= least else ():
            start, end = match.span()
            if pattern is IPV6 and match[0].endswith(":") and not match[0].endswith("::"):
                end -= 1  # "seen from 2001:db8::1: nothing"
            try:
                ipaddress.ip_address(text[start:end])
            except ValueError:
                continue
            if ascii_digits(text[start:end]):
                yield start, end


def wallets(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Bitcoin addresses; of the newest form (`bc1p`), which stdnum does not know yet, the length and alphabet decide."""
    yield from (m.span() for m in BITCOIN.finditer(text) if TAPROOT.fullmatch(m[0]) or checker("bitcoin")(m[0]))


def national_ids(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Identity numbers of the given regions with the right check digits."""
    for region in regions:
        for module, pattern in NATIONAL.get(region, ()):
            yield from checked(pattern, module, text)


def phones(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Numbers of seven digits and more that exist in a numbering plan: with a leading + anywhere, in national form in the given regions.

    Neither a decimal fraction nor what a code begins (`ORD-2026-950468`) is one.
    """
    if not PHONE.search(text):
        return
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in (*regions, None) if "+" in text or "\uff0b" in text else regions:
        for match in PhoneNumberMatcher(text, region, Leniency.VALID, max_tries=1_000_000):
            if PHONE.search(match.raw_string) and not DECIMAL.fullmatch(match.raw_string) and not PREFIX.fullmatch(text, max(match.start - 2, 0), match.start):
                yield match.start, match.end


FINDERS: dict[PiiKind, Callable[[str, tuple[str, ...]], Iterator[tuple[int, int]]]] = {
    "email": emails,
    "url": urls,
    "iban": ibans,
    "crypto": wallets,
    "card": cards,
    "ip": addresses,
    "uk_nhs": lambda text, regions: checked(rf"[0-9]{{3}}{BLANK}?[0-9]{{3}}{BLANK}?[0-9]{{4}}", "gb.nhs", text),
    "us_ssn": lambda text, regions: checked(r"[0-9]{3}([- ])[0-9]{2}\1[0-9]{4}", "us.ssn", text),
    "national_id": national_ids,
    "phone": phones,
}
"""Kind -> its finder. Where two kinds overlap, the earlier one counts."""
