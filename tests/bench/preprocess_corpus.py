"""The made corpus of the preprocess benchmark: believable rows, always the same, streamed to disk as collect would write them.

Training pairs of 5 to 400 words whose frequencies fall as in real text. A twentieth repeats an earlier row, a twentieth nearly
does; a tenth holds personal data that is valid (checksums and numbering plans), a tenth order numbers and dates that are none; an
eighth has accents, emoji, Chinese or broken encoding; one in fifty has no text; one in fifty is evaluation, and one in a
hundred training rows repeats a piece of that.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from stdnum import iban, luhn

from stages.files import write_json, write_jsonl

SYLLABLES = (
    "ba",
    "cor",
    "den",
    "el",
    "fi",
    "gra",
    "hu",
    "in",
    "jo",
    "ka",
    "lo",
    "mer",
    "ni",
    "or",
    "pa",
    "qui",
    "ra",
    "sto",
    "ti",
    "un",
    "ver",
    "wi",
    "xa",
    "ya",
    "zo",
)
FOREIGN = (
    "café",
    "naïve",
    "Zürich",
    "señor",
    "garçon",
    "Łódź",
    "退货政策",
    "ありがとう",
    "доставка",
    "👍",
    "–",
    "“quoted”",
    "cafÃ©",
    "itâ€™s",
    "&amp;",
    "fiancé",
)
PLAIN = ("order 482913", "on 2024-11-23 at 10:15", "for 129.99 EUR", "ticket 7731-4420", "version 1.2.3", "at 18:30")


def words(draw: random.Random) -> tuple[list[str], list[float]]:
    """Twenty thousand words, and their cumulative frequencies by Zipf's law."""
    vocabulary = ["".join(draw.choices(SYLLABLES, k=1 + min(rank % 4, 3))) + "aeioust"[rank % 7] for rank in range(20_000)]
    return vocabulary, list(accumulate(1 / (rank + 5) for rank in range(20_000)))


def personal(draw: random.Random) -> str:
    """One piece of personal data with the right check digits."""
    match draw.randrange(5):
        case 0:
            return f"mail me at {draw.choice(SYLLABLES)}.{draw.choice(SYLLABLES)}{draw.randrange(99)}@example.com"
        case 1:
            return f"call {draw.choice(('+49 30 90182', '(415) 555-2', '020 7946 0'))}{draw.randrange(100, 1000)}"
        case 2:
            digits = f"4{draw.randrange(10**14):014d}"
            return f"card {digits}{luhn.calc_check_digit(digits)}"
        case 3:
            bban = f"{draw.randrange(10**18):018d}"
            return f"IBAN DE{iban.calc_check_digits(f'DExx{bban}')}{bban}"
    return f"from {'.'.join(str(draw.randrange(1, 255)) for _ in range(4))}"


def texts(count: int, draw: random.Random, seen: list[str]) -> Iterator[str]:
    """So many texts. `seen`: what a hundredth of them takes a piece of; empty: none does."""
    vocabulary, weights = words(random.Random("words"))
    recent: list[str] = []
    for _ in range(count):
        kind = draw.random()
        if recent and kind < 0.05:
            yield draw.choice(recent)
            continue
        if recent and kind < 0.10:
            yield f"Hello, {draw.choice(recent)} Thanks!"
            continue
        pieces = draw.choices(vocabulary, cum_weights=weights, k=min(5 + int(draw.lognormvariate(3.6, 0.7)), 400))
        for chance, piece in ((0.10, draw.choice(PLAIN)), (0.125, draw.choice(FOREIGN)), (0.10, personal(draw))):
            if draw.random() < chance:
                pieces.insert(draw.randrange(len(pieces)), piece)
        if seen and draw.random() < 0.01:
            pieces = draw.choice(seen).split()[:40] + pieces[:4]
        text = " ".join(pieces).capitalize() + "."
        recent = [*recent[-200:], text]
        yield "" if draw.random() < 0.02 else text


def made_rows(source: str, count: int, seen: list[str]) -> Iterator[dict[str, Any]]:
    """So many rows of a source."""
    for number, text in enumerate(texts(count, random.Random(source), seen)):
        yield {
            "id": f"{number:09d}", "source": source, "licence": "Apache-2.0", "classification": "public", "text": text,
            "completion": "We have sent it.", "label": "parcel", "group": f"customer-{number // 3}", "messages": [], "meta": {"channel": "mail"},
        }  # fmt: skip


def write_corpus(folder: Path, rows: int) -> None:
    """Write data/collect: `tickets` trains, `official` measures."""
    official = folder / "data/collect/official.jsonl"
    write_jsonl(official, made_rows("official", rows // 50, []))
    with official.open(encoding="utf-8") as file:
        seen = [json.loads(line)["text"] for line, _ in zip(file, range(500), strict=False)]
    write_jsonl(folder / "data/collect/tickets.jsonl", made_rows("tickets", rows - rows // 50, seen))
    uses = {"tickets": {"use": "train", "rows": rows - rows // 50}, "official": {"use": "test", "rows": rows // 50}}
    write_json(folder / "data/collect/manifest.json", uses)
