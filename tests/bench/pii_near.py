"""What looks like personal data and is none: orders, dates, versions, wrong check digits."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from stdnum.gb import nhs

from tests.bench.pii_drawn import account, digits, groups, payment_card, tax_number


def wrong(number: str, rng: random.Random) -> str:
    """The number with its last digit changed: the check digit is wrong."""
    at = max(i for i, c in enumerate(number) if c.isdigit())
    return number[:at] + str((int(number[at]) + rng.randrange(1, 9)) % 10) + number[at + 1 :]


def no_patient(rng: random.Random) -> str:
    """A number with the form of the National Health Service's and a wrong check digit; with its exchange of 1 it is no telephone number either."""
    while nhs.is_valid(number := f"{rng.choice('46789')}{digits(rng, 2)}1{digits(rng, 6)}"):
        continue
    return groups(number, (3, 3), rng.choice(" -"))


NEAR: dict[str, Callable[[random.Random], str]] = {
    "order": lambda r: r.choice((f"K-{digits(r, 5)}", f"#{digits(r, 6)}", f"SO{digits(r, 8)}", f"{digits(r, 3)}-{digits(r, 7)}-{digits(r, 7)}", f"ORD-2026-{digits(r, 6)}")),
    "tracking": lambda r: r.choice((f"1Z{''.join(r.choices(string.ascii_uppercase + string.digits, k=16))}", f"JD{digits(r, 18)}", f"RR{digits(r, 9)}DE")),
    "date": lambda r: r.choice((f"2026-{r.randrange(1, 13):02d}-{r.randrange(1, 29):02d} {r.randrange(24):02d}:{r.randrange(60):02d}", f"{r.randrange(1, 29)}.{r.randrange(1, 13)}.2026",
                                f"{r.randrange(1, 13)}/{r.randrange(1, 29)}/26", f"20260{r.randrange(1, 10)}{r.randrange(10, 29)}T{r.randrange(10, 24)}1500Z")),
    "version": lambda r: r.choice((f"v{r.randrange(20)}.{r.randrange(20)}.{r.randrange(20)}", f"3.11.{r.randrange(20)}-rc{r.randrange(9)}", f"{r.randrange(300, 999)}.1.1.{r.randrange(9)}")),
    "amount": lambda r: r.choice((f"{r.randrange(10, 9999)}.{r.randrange(100):02d} EUR", f"$1,{digits(r, 3)},{digits(r, 3)}.00", f"{digits(r, 2)}%", f"{r.randrange(2, 90)} x {digits(r, 3)} cm")),
    "size": lambda r: f"{r.randrange(10, 60)}-{r.randrange(10, 60)}-{r.randrange(10, 60)} mm",
    "place": lambda r: f"{r.randrange(90)}.{digits(r, 6)}, {r.randrange(180)}.{digits(r, 6)}",
    "handle": lambda r: r.choice(("me @ home", "@kestrel_desk", "std::vector", "a@b", "10:20:30", "C::D", "user@localhost")),
    "wrong card": lambda r: wrong(payment_card(r)[0], r),
    "wrong iban": lambda r: wrong(account(r)[0], r),
    "wrong nhs": no_patient,
    "wrong tax number": lambda r: wrong(tax_number(r)[0], r),
    "wrong ssn": lambda r: f"{r.choice(('000', '666', '9' + digits(r, 2)))}-{digits(r, 2)}-{digits(r, 4)}",
    "digits": lambda r: digits(r, r.choice((4, 5, 6, 12, 14, 20, 24))),
    "digest": lambda r: r.randbytes(r.choice((4, 16, 20))).hex(),
}  # fmt: skip
