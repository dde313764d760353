"""Pieces of personal data, drawn: each kind in the many forms in which people write it, with check digits computed here."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

import phonenumbers
from stdnum import iban, luhn
from stdnum.de import idnr
from stdnum.gb import nhs

from conf.schema import PiiKind

NAMES = ("jo.bloggs", "Ana_Maria", "m.o'neill", "li.wei+shop", "renée", "k.j.99", "SALES-desk", "пётр", "x", "first.last.middle", "j%p")
HOSTS = ("example.com", "mail.example.co.uk", "exämple.fr", "EXAMPLE.ORG", "a-b.example.museum", "firma.example", "sub.sub.example.net")
COUNTRIES = ("US", "GB", "DE", "FR", "IN", "BR", "JP", "NL", "ZA", "AU")
BANKS = ("DE", "GB", "FR", "NL", "ES", "PL", "CH", "AT")

Made = tuple[str, str]
"""What is written, and the name of its form."""


def digits(rng: random.Random, count: int) -> str:
    """So many."""
    return "".join(rng.choices(string.digits, k=count))


def groups(number: str, sizes: tuple[int, ...], blank: str) -> str:
    """The number in groups."""
    parts, at = [], 0
    for size in sizes:
        parts.append(number[at : at + size])
        at += size
    return blank.join(part for part in [*parts, number[at:]] if part)


def email(rng: random.Random) -> Made:
    """An address."""
    name, host = rng.choice(NAMES), rng.choice(HOSTS)
    form = rng.choices(("plain", "mailto", "named", "spelt out"), (16, 1, 2, 1))[0]
    if form == "spelt out":
        return f"{name} at {host.replace('.', ' dot ')}", form
    return f"{name}@{host}", form


def phone(rng: random.Random) -> Made:
    """A number that a plan has: national forms of three countries, international ones of ten."""
    while True:
        region = rng.choice(COUNTRIES)
        kind = rng.choice((phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE))
        example = phonenumbers.example_number_for_type(region, kind)
        nsn = str(example.national_number)
        number = phonenumbers.PhoneNumber(country_code=example.country_code, national_number=int(nsn[: len(nsn) - 4] + digits(rng, 4)))
        if phonenumbers.is_valid_number(number):
            break
    forms = phonenumbers.PhoneNumberFormat
    international = phonenumbers.format_number(number, forms.INTERNATIONAL)
    made = {"e164": phonenumbers.format_number(number, forms.E164), "international": international, "dots": international.replace(" ", ".").replace("-", "."),
            "hyphens": international.replace(" ", "-"), "no-break": international.replace(" ", "\u00a0"), "extension": f"{international} ext. {digits(rng, 3)}"}  # fmt: skip
    if region in ("US", "GB", "DE"):
        national = phonenumbers.format_number(number, forms.NATIONAL)
        made |= {"national": national, "national, bare": national.translate({ord(c): None for c in " ()-/"}), "national, dots": national.replace(" ", ".")}
        if region != "US":
            code, _, rest = international.partition(" ")
            made["with (0)"] = f"{code} (0) {rest}"
    form = rng.choice(sorted(made))
    return made[form], form


def payment_card(rng: random.Random) -> Made:
    """A card number, sometimes with what is written behind it."""
    head, count = rng.choice((("4", 16), ("51", 16), ("2720", 16), ("6011", 16), ("37", 15), ("3528", 16)))
    number = head + digits(rng, count - len(head) - 1)
    number += luhn.calc_check_digit(number)
    sizes = (4, 6, 5) if count == 15 else (4, 4, 4)
    made = {"bare": number, "blanks": groups(number, sizes, " "), "hyphens": groups(number, sizes, "-"), "no-break": groups(number, sizes, "\u00a0"),
            "dots": groups(number, sizes, "."), "expiry": groups(number, sizes, " ")}  # fmt: skip
    form = rng.choices(sorted(made), [{"dots": 1, "no-break": 2}.get(name, 6) for name in sorted(made)])[0]
    return made[form], form


def account(rng: random.Random) -> Made:
    """An IBAN."""
    while True:
        country = rng.choice(BANKS)
        size = {"DE": 18, "GB": 18, "FR": 23, "NL": 14, "ES": 20, "PL": 24, "CH": 17, "AT": 16}[country]
        bban = ("NWBK" if country == "GB" else "INGB" if country == "NL" else "") + digits(rng, size)
        bban = bban[:size]
        right = f"{country}{iban.calc_check_digits(f'{country}xx{bban}')}{bban}"
        if iban.is_valid(right):
            break
    made = {"bare": right, "blanks": iban.format(right), "small": right.lower(), "hyphens": iban.format(right, "-"), "no-break": iban.format(right, "\u00a0")}
    form = rng.choices(sorted(made), [2 if name in ("no-break", "hyphens") else 6 for name in sorted(made)])[0]
    return made[form], form


def address(rng: random.Random) -> Made:
    """Of a machine."""
    v4, v6 = ".".join(str(rng.randrange(1, 255)) for _ in range(4)), ":".join(f"{rng.randrange(1, 65_536):x}" for _ in range(8))
    made = {"v4": v4, "v6": v6, "v6, short": f"2001:db8::{rng.randrange(16, 65_536):x}", "v6, capitals": v6.upper(), "mapped": f"::ffff:{v4}"}
    form = rng.choice(sorted(made))
    return made[form], form


def wallet(rng: random.Random) -> Made:
    """Of Bitcoin, with the right checksum."""
    from hashlib import sha256

    if rng.random() < 0.6:
        payload = bytes([rng.choice((0, 5))]) + rng.randbytes(20)
        payload += sha256(sha256(payload).digest()).digest()[:4]
        alphabet, value, text = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", int.from_bytes(payload, "big"), ""
        while value:
            value, rest = divmod(value, 58)
            text = alphabet[rest] + text
        return "1" * (len(payload) - len(payload.lstrip(b"\0"))) + text, "base58"
    return segwit(rng), "bech32"


def segwit(rng: random.Random) -> str:
    """Version 0, 20 bytes: BIP 173."""
    data, bits, count = [0], 0, 0
    for byte in rng.randbytes(20):
        bits, count = (bits << 8) | byte, count + 8
        while count >= 5:
            count -= 5
            data.append((bits >> count) & 31)
    check = 1
    for value in [3, 3, 0, 2, 3, *data, 0, 0, 0, 0, 0, 0]:
        top = check >> 25
        check = ((check & 0x1FFFFFF) << 5) ^ value
        for i, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if (top >> i) & 1 else 0
    check ^= 1
    return "bc1" + "".join("qpzry9x8gf2tvdw0s3jn54khce6mua7l"[v] for v in [*data, *((check >> 5 * (5 - i)) & 31 for i in range(6))])


def ssn(rng: random.Random) -> Made:
    """A social security number of the United States."""
    number = f"{rng.choice([*range(1, 666), *range(667, 772)]):03d}{rng.randrange(1, 100):02d}{rng.randrange(1, 10_000):04d}"
    form = rng.choices(("hyphens", "blanks", "bare"), (8, 1, 1))[0]
    return groups(number, (3, 2), {"hyphens": "-", "blanks": " ", "bare": ""}[form]), form


def patient(rng: random.Random) -> Made:
    """A number of the National Health Service."""
    while True:
        number = rng.choice("46789") + digits(rng, 8)
        check = -sum(int(digit) * weight for digit, weight in zip(number, range(10, 1, -1), strict=True)) % 11
        if check < 10 and nhs.is_valid(right := f"{number}{check}"):
            break
    form = rng.choice(("bare", "blanks", "hyphens"))
    return groups(right, (3, 3), {"bare": "", "blanks": " ", "hyphens": "-"}[form]), form


def link(rng: random.Random) -> Made:
    """An address of the web."""
    host, path = (
        rng.choice(("example.com", "shop.example.co.uk", "exämple.fr", "localhost:8080")),
        rng.choice(("", "/", "/o?id=12&b=c", "/a/b.html#x", "/a_(b)")),
    )
    form = rng.choices(("scheme", "www", "bare"), (8, 2, 1))[0]
    return {"scheme": "https://", "www": "www.", "bare": ""}[form] + host + path, form


def tax_number(rng: random.Random) -> Made:
    """A tax number of Germany."""
    while True:
        number = rng.choice("123456789") + digits(rng, 9)
        rest = 10
        for digit in number:
            rest = ((int(digit) + rest) % 10 or 10) * 2 % 11
        right = number + str((11 - rest) % 10)
        if idnr.is_valid(right):
            break
    form = rng.choice(("bare", "blanks"))
    return groups(right, (2, 3, 3), " " if form == "blanks" else ""), form


KINDS: dict[PiiKind, Callable[[random.Random], Made]] = {
    "email": email, "phone": phone, "card": payment_card, "iban": account, "ip": address, "crypto": wallet, "us_ssn": ssn, "uk_nhs": patient, "url": link,
    "national_id": tax_number,
}  # fmt: skip
