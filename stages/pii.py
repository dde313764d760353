"""Personal data in text: found by checksums and numbering plans, written over by its kind (`<EMAIL>`).

What must be exact comes from a library: telephone numbers from phonenumbers, everything with check digits from python-stdnum,
addresses of machines from ipaddress. Both import in 0.15 s and 22 MB; presidio's recognisers, which check the same digits,
bring spaCy and took 12 s and 444 MB, in every worker and in the service.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

from conf.schema import PiiKind

DIGIT = re.compile(r"\d")
EMAIL = re.compile(r"(?<![\w.%+'-])[\w.%+'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
URL = re.compile(r"(?<!\w)(?:[a-z][a-z0-9+]{1,15}://|www\.)[^\s<>\"']*[^\s<>\"'.,;:!?)\]]", re.IGNORECASE)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}")
CARD = re.compile(r"(?<![0-9])(?<![0-9][ -])[2-6](?:[ -]?[0-9]){12,18}(?![0-9])")
IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,37}(?:(?:\.[0-9]{1,3}){3})?(?![\w:])")
BITCOIN = re.compile(r"(?<!\w)(?:[13][1-9A-HJ-NP-Za-km-z]{25,34}|bc1[02-9ac-hj-np-z]{11,71})(?!\w)")
TAPROOT = re.compile(r"bc1p[02-9ac-hj-np-z]{58}")
PHONE = re.compile(r"\d(?:[^\w\n]{0,4}\d){6}")


def grouped(digits: int, first: str = "[0-9]", last: str = "[0-9]") -> str:
    """Pattern of a number written in groups: so many digits with a blank, dot, slash or hyphen between them or not."""
    return rf"{first}(?:[ ./-]?[0-9]){{{digits - 2}}}[ ./-]?{last}"


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


@dataclass(frozen=True, order=True)
class Span:
    """One piece of personal data: `text[start:end]`."""

    start: int
    end: int
    kind: PiiKind


def find(text: str, kinds: Sequence[PiiKind], regions: Sequence[str]) -> list[Span]:
    """Personal data of these kinds, in order, without overlap.

    Args:
        text: what is searched.
        kinds: what is searched for.
        regions: ISO 3166 codes of the countries whose national forms of telephone and identity numbers count.
    """
    if not worth_a_look(text):
        return []
    found: list[Span] = []
    for kind, finder in FINDERS.items():
        if kind in kinds:
            for start, end in finder(text, tuple(regions)):
                at = bisect_left(found, start, key=lambda span: span.start)
                if (at == 0 or found[at - 1].end <= start) and (at == len(found) or end <= found[at].start):
                    found.insert(at, Span(start, end, kind))
    return found


def worth_a_look(text: str) -> bool:
    """Whether there is anything that all personal data has one of."""
    return "@" in text or "::" in text or has_url(text) or DIGIT.search(text) is not None


def has_url(text: str) -> bool:
    """Whether there may be an address of the web."""
    return "://" in text or "www." in text.lower()


def ascii_digits(text: str) -> int:
    """How many there are."""
    data = text.encode(errors="replace")
    return len(data) - len(data.translate(None, b"0123456789"))


def redact(text: str, kinds: Sequence[PiiKind], regions: Sequence[str]) -> str:
    """The text with `<KIND>` in the place of each find, until there is none left."""
    while spans := find(text, kinds, regions):
        pieces, last = [], 0
        for span in spans:
            pieces += [text[last : span.start], f"<{span.kind.upper()}>"]
            last = span.end
        text = "".join([*pieces, text[last:]])
    return text


def pseudonym(key: str, kinds: Sequence[PiiKind], regions: Sequence[str]) -> str:
    """The key, or a digest of it if it holds personal data: it still keeps rows together, and names nobody."""
    return hashlib.sha256(key.encode()).hexdigest()[:16] if find(key, kinds, regions) else key


@lru_cache(maxsize=64)
def checker(module: str) -> Callable[[str], bool]:
    """`is_valid` of a module of stdnum: form, components and check digits."""
    valid: Callable[[str], bool] = import_module(f"stdnum.{module}").is_valid
    return valid


def checked(pattern: re.Pattern[str] | str, module: str, text: str) -> Iterator[tuple[int, int]]:
    """Where the pattern stands alone and stdnum says that the number is right."""
    if isinstance(pattern, str):
        pattern = re.compile(rf"(?<![\w+])(?<![0-9][ ./-]){pattern}(?!\w)")
    yield from (match.span() for match in pattern.finditer(text) if checker(module)(re.sub("[ ./]", "", match[0])))


def emails(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Addresses of the usual form, in any script."""
    if "@" in text:
        yield from (match.span() for match in EMAIL.finditer(text))


def urls(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Addresses with a scheme, or starting with `www.`."""
    if has_url(text):
        yield from (match.span() for match in URL.finditer(text))


def ibans(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Numbers with the form of their country and the right check digits (mod 97); words that follow are left alone."""
    for match in IBAN.finditer(text):
        for end in range(match.end(), match.start() + 14, -1):
            if text[end - 1] not in " -" and checker("iban")(text[match.start() : end]):
                yield match.start(), end
                break


def cards(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Numbers of 13 to 19 digits in the payment networks' ranges with the right check digit (Luhn)."""
    if ascii_digits(text) >= 13:
        yield from (match.span() for match in CARD.finditer(text) if checker("luhn")(re.sub("[ -]", "", match[0])))


def addresses(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """IPv4 and IPv6 addresses, but not the bare `::`."""
    for pattern, mark, least in ((IPV4, ".", 3), (IPV6, ":", 2)):
        for match in pattern.finditer(text) if text.count(mark) >= least else ():
            start, end = match.span()
            if pattern is IPV6 and match[0].endswith(":") and not match[0].endswith("::"):
                end -= 1  # "seen from 2001:db8::1: nothing"
            try:
                ipaddress.ip_address(text[start:end])
            except ValueError:
                continue
            if text[start:end] != "::":
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
    """Numbers that exist in a numbering plan: with a leading + anywhere, in national form in the given regions."""
    if not PHONE.search(text):
        return
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in (*regions, None) if "+" in text or "\uff0b" in text else regions:
        for match in PhoneNumberMatcher(text, region, Leniency.VALID, max_tries=1_000_000):
            yield match.start, match.end


FINDERS: dict[PiiKind, Callable[[str, tuple[str, ...]], Iterator[tuple[int, int]]]] = {
    "email": emails,
    "url": urls,
    "iban": ibans,
    "crypto": wallets,
    "card": cards,
    "ip": addresses,
    "uk_nhs": lambda text, regions: checked(grouped(10), "gb.nhs", text),
    "us_ssn": lambda text, regions: checked(r"[0-9]{3}-[0-9]{2}-[0-9]{4}", "us.ssn", text),
    "national_id": national_ids,
    "phone": phones,
}
"""Kind -> its finder. Where two kinds overlap, the earlier one counts."""
