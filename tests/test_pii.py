"""Personal data: each kind found in its forms, nothing found in what only looks like it, and redaction that is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from time import process_time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum import iban, luhn

from conf.schema import PiiKind
from stages.pii import CARD, FINDERS, PHONE, cards, find, phones, pseudonym, redact, worth_a_look

KINDS: tuple[PiiKind, ...] = get_args(PiiKind)
DEFAULT: tuple[PiiKind, ...] = ("email", "phone", "iban", "card", "ip")
REGIONS = ("US", "GB", "DE")

FOUND = [
    ("email", "write to jo.bloggs+shop@mail.example.co.uk, please", "write to <EMAIL>, please"),
    ("email", "(renée@exämple.fr)", "(<EMAIL>)"),
    ("phone", "call +49 30 901820 today", "call <PHONE> today"),
    ("phone", "call 020 7946 0958 today", "call <PHONE> today"),
    ("phone", "ring (415) 555-2671.", "ring <PHONE>."),
    ("iban", "to DE89 3704 0044 0532 0130 00 please", "to <IBAN> please"),
    ("iban", "to gb29nwbk60161331926819", "to <IBAN>"),
    ("card", "my card 4111-1111-1111-1111 failed", "my card <CARD> failed"),
    ("card", "amex 378282246310005", "amex <CARD>"),
    ("ip", "from 192.168.0.1.", "from <IP>."),
    ("ip", "from 2001:db8::8a2e:370:7334: nothing", "from <IP>: nothing"),
    ("crypto", "pay 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "pay <CRYPTO>"),
    ("crypto", "pay bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "pay <CRYPTO>"),
    ("us_ssn", "my SSN is 536-90-4399", "my SSN is <US_SSN>"),
    ("uk_nhs", "NHS 943 476 5870", "NHS <UK_NHS>"),
    ("url", "see https://shop.example.com/o?id=12).", "see <URL>)."),
    ("url", "see www.example.com, then", "see <URL>, then"),
    ("national_id", "Steuer-ID 36 574 261 809", "Steuer-ID <NATIONAL_ID>"),
]
NOT_FOUND = [
    ("email", "me @ home, 3@2"),
    ("phone", "order 482913, ordered 2024-11-23 10:15, 129.99 EUR"),
    ("phone", "tracking 1Z999AA10123456784"),
    ("iban", "DE89 3704 0044 0532 0130 01"),
    ("card", "4111 1111 1111 1112"),
    ("card", "41111111111111110000000"),
    ("ip", "version 1.2.3, at 12:30:45, std::vector, 999.1.1.1"),
    ("crypto", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb"),
    ("us_ssn", "000-12-3456"),
    ("uk_nhs", "943 476 5871"),
    ("national_id", "36 574 261 808"),
]


@pytest.mark.parametrize(("kind", "text", "redacted"), FOUND)
def test_each_kind_is_found_and_written_over(kind: PiiKind, text: str, redacted: str) -> None:
    assert redact(text, [kind], REGIONS) == redacted
    assert [span.kind for span in find(text, [kind], REGIONS)] == [kind]


@pytest.mark.parametrize(("kind", "text"), NOT_FOUND)
def test_what_only_looks_like_it_stays(kind: PiiKind, text: str) -> None:
    assert redact(text, [kind], REGIONS) == text


def test_every_kind_of_the_schema_has_a_finder_and_an_example() -> None:
    assert set(FINDERS) == set(KINDS) == {kind for kind, *_ in FOUND}


def test_only_the_kinds_asked_for_are_found() -> None:
    assert redact("jo@example.com, 4111 1111 1111 1111", ["card"], REGIONS) == "jo@example.com, <CARD>"


def test_national_forms_need_their_region() -> None:
    assert redact("020 7946 0958", ["phone"], ["GB"]) == "<PHONE>"
    assert redact("020 7946 0958", ["phone"], []) == "020 7946 0958"


def test_an_iban_is_not_taken_for_a_telephone_number() -> None:
    assert redact("DE89370400440532013000", KINDS, REGIONS) == "<IBAN>"


def test_a_group_that_names_a_person_becomes_a_digest() -> None:
    assert pseudonym("customer-7", DEFAULT, REGIONS) == "customer-7"
    assert pseudonym("jo@example.com", DEFAULT, REGIONS) == pseudonym("jo@example.com", DEFAULT, REGIONS) != pseudonym("al@example.com", DEFAULT, REGIONS)
    assert "@" not in pseudonym("jo@example.com", DEFAULT, REGIONS)


def test_long_texts_take_linear_time() -> None:
    for piece, times, end in (("a", 200_000, "@"), ("a.", 100_000, "@b"), ("1", 200_000, ""), ("1 ", 100_000, ""), (":", 100_000, "1"), ("a1:", 60_000, "")):
        text = piece * times + end
        started = process_time()
        find(text, [kind for kind in KINDS if kind != "phone"], REGIONS)
        assert process_time() - started < 2


pieces = st.one_of(
    st.sampled_from([text for _, text, _ in FOUND] + [text for _, text in NOT_FOUND]),
    st.text(alphabet="0123456789+-(). @:/abDE<>\n", max_size=24),
    st.text(max_size=8),
)
texts = st.lists(pieces, max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_redaction_is_idempotent_and_leaves_none(text: str) -> None:
    once = redact(text, KINDS, REGIONS)
    assert find(once, KINDS, REGIONS) == []
    assert redact(once, KINDS, REGIONS) == once


@settings(max_examples=300)
@given(texts)
def test_nothing_is_passed_over_by_what_is_looked_at_first(text: str) -> None:
    from phonenumbers import Leniency, PhoneNumberMatcher

    assert worth_a_look(text) == bool(re.search(r"[\d@]|://|www\.|::", text, re.IGNORECASE))
    assert list(cards(text, ())) == [match.span() for match in CARD.finditer(text) if luhn.is_valid(re.sub("[ -]", "", match[0]))]
    for regions in (REGIONS, ()):
        everywhere = [(m.start, m.end) for region in (*regions, None) for m in PhoneNumberMatcher(text, region, Leniency.VALID, max_tries=1_000_000)]
        assert set(phones(text, regions)) == (set(everywhere) if PHONE.search(text) else set())


@settings(max_examples=60, deadline=None)
@given(st.integers(10**14, 6 * 10**14 - 1), st.sampled_from(["{}", "card {}.", "{} and"]))
def test_any_card_number_with_the_right_digit_is_found(number: int, form: str) -> None:
    digits = f"4{number}"[:15]
    right = digits + luhn.calc_check_digit(digits)
    assert redact(form.format(right), ["card"], REGIONS) == form.format("<CARD>")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**18 - 1), st.booleans())
def test_any_iban_with_the_right_digits_is_found(number: int, spaced: bool) -> None:
    bban = f"{number:018d}"
    right = f"DE{iban.calc_check_digits(f'DExx{bban}')}{bban}"
    assert redact(iban.format(right) if spaced else right, ["iban"], REGIONS) == "<IBAN>"


def test_spans_are_ordered_and_apart() -> None:
    spans = find(" ".join(text for _, text, _ in FOUND), KINDS, REGIONS)
    assert spans == sorted(spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))


def test_it_imports_no_language_model_and_nothing_heavy() -> None:
    code = "import sys; from stages.pii import FINDERS, redact; redact('+49 30 901820 a@b.de', list(FINDERS), ['DE']);"
    code += "print(sorted({'spacy', 'presidio_analyzer', 'torch', 'datatrove', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
