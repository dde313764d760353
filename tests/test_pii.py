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
from stages import pii
from stages.pii import ROUNDS, find, pseudonym, redact, rewrite, worth_a_look
from stages.pii_finders import CARD, DECIMAL, FINDERS, NUMBER_BEFORE, PHONE, PREFIX, cards, phones
from tests.bench.pii import LEAST, ours, rate
from tests.bench.pii_made import samples

KINDS: tuple[PiiKind, ...] = get_args(PiiKind)
DEFAULT: tuple[PiiKind, ...] = ("email", "phone", "iban", "card", "ip")
REGIONS = ("US", "GB", "DE")

FOUND = [
    ("email", "write to jo.bloggs+shop@mail.example.co.uk, please", "write to <EMAIL>, please"),
    ("email", "(renée@exämple.fr)", "(<EMAIL>)"),
    ("email", "write to _jane@example.com_", "write to <EMAIL>_"),
    ("email", "ご質問はjane@example.comまでご連絡くださいますようよろしくお願いいたします", "<EMAIL>までご連絡くださいますようよろしくお願いいたします"),
    ("email", f"{'あ' * 70}jane@example.com", f"{'あ' * 70}<EMAIL>"),
    ("ip", "サーバー192.168.1.1に", "サーバー<IP>に"),
    ("card", "cvv 123 4111 1111 1111 1111 12/27", "cvv 123 <CARD> 12/27"),
    ("card", "2 x 07 4111111111111111", "2 x 07 <CARD>"),
    ("phone", "call +49 30 901820 today", "call <PHONE> today"),
    ("phone", "call 020 7946 0958 today", "call <PHONE> today"),
    ("phone", "ring (415) 555-2671.", "ring <PHONE>."),
    ("iban", "to DE89 3704 0044 0532 0130 00 please", "to <IBAN> please"),
    ("iban", "to gb29nwbk60161331926819", "to <IBAN>"),
    ("card", "my card 4111-1111-1111-1111 failed", "my card <CARD> failed"),
    ("card", "amex 378282246310005", "amex <CARD>"),
    ("card", "4111 1111 1111 1111 12/27 737", "<CARD> 12/27 737"),
    ("iban", "booking AB12 paid from DE89 3704 0044 0532 0130 00", "booking AB12 paid from <IBAN>"),
    ("ip", "from 192.168.0.1.", "from <IP>."),
    ("ip", "from 2001:db8::8a2e:370:7334: nothing", "from <IP>: nothing"),
    ("ip", "from ::ffff:192.168.0.1", "from <IP>"),
    ("card", "4111.1111.1111.1111", "<CARD>"),
    ("card", "4111\u00a01111\u00a01111\u00a01111", "<CARD>"),
    ("iban", "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000", "<IBAN>"),
    ("us_ssn", "536 90 4399", "<US_SSN>"),
    ("url", "(see https://example.com/a_(b))", "(see <URL>)"),
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
    ("card", "row 12 4 1111 11111 111111 1"),
    ("ip", "C::D, ::"),
    ("phone", "ORD-2026-950468 at 13.103885"),
    ("uk_nhs", "on 2026-06-21 02:00"),
    ("us_ssn", "536-90 4399"),
    ("card", "JD4111111111111111"),
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


SLOW = [
    ("4111 1111 1111 1111 ", ""), ("4111 1111 1111 1111 +49 30 901820 536-90-4399 943 476 5870 ", ""), ("020 7946 0958/", ""), ("DE89 ", ""),
    ("DE89 3704 0044 0532 0130 00 ", ""), ("ab12 ", ""), ("1", ""), ("1 ", ""), ("2012-01-02 08", ""), ("\u00a0", "1"), (",", "1"), ("-", "1#"), ("a.", "@b"),
    ("a@b.", ""), ("www.", ""), ("a://", ""), (":", "1"), ("1.", ""), ("bc1q", ""), ("::1 ", ""), ("(1)", ""), ("1x", ""), ("abcdef00a00a000a ", ""),
]  # fmt: skip


@pytest.mark.parametrize(("piece", "end"), SLOW)
def test_time_grows_with_the_length_and_no_faster(piece: str, end: str) -> None:
    """Four times the text may take eight times as long: what grows with the square takes sixteen."""

    def seconds(length: int) -> float:
        text, took = ((piece * length)[:length] + end), []
        for _ in range(3):
            started = process_time()
            redact(text, KINDS, REGIONS)
            took.append(process_time() - started)
        return min(took)

    assert seconds(8_000) < 8 * seconds(2_000) + 0.01


@pytest.mark.parametrize(("piece", "end"), SLOW)
def test_each_character_is_looked_at_a_few_times_at_most(piece: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(pii, "find", lambda text, kinds, regions: looked.append(text) or find(text, kinds, regions))
    text = (piece * 3000)[:3000] + end
    redact(text, KINDS, REGIONS)
    assert sum(map(len, looked)) <= (ROUNDS + 1) * 3 * len(text)  # a placeholder can be longer than the find: `<NATIONAL_ID>`
    assert len(looked) <= ROUNDS + 1


def test_a_line_in_which_finds_go_on_loses_all_that_could_be_one() -> None:
    number = "943 476 5919"
    assert redact(" ".join([number] * ROUNDS), KINDS, REGIONS) == " ".join(["<UK_NHS>"] * ROUNDS)
    assert redact(f"from  {' '.join([number] * (ROUNDS + 1))} and 7\nto {number} 7", KINDS, REGIONS) == "from  <UK_NHS> and <UK_NHS>\nto <UK_NHS> 7"


def test_what_is_written_is_told_the_find() -> None:
    told: list[tuple[str, str]] = []
    assert rewrite("jo@example.com or\n192.168.0.1", KINDS, REGIONS, lambda kind, found: told.append((kind, found)) or "<X>") == "<X> or\n<X>"
    assert told == [("email", "jo@example.com"), ("ip", "192.168.0.1")]


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


@settings(max_examples=150, deadline=None)
@given(texts)
def test_lines_are_looked_at_apart_and_finds_replaced_until_none_is_left(text: str) -> None:
    once = text
    for _ in range(ROUNDS):
        for span in reversed(find(once, KINDS, REGIONS)):
            once = f"{once[: span.start]}<{span.kind.upper()}>{once[span.end :]}"
    if not find(once, KINDS, REGIONS):
        assert redact(text, KINDS, REGIONS) == once


@settings(max_examples=300)
@given(texts)
def test_nothing_is_passed_over_by_what_is_looked_at_first(text: str) -> None:
    from phonenumbers import Leniency, PhoneNumberMatcher

    assert worth_a_look(text) == bool(re.search(r"[\d@]|://|www\.|::", text, re.IGNORECASE))
    whole = {
        match.span()
        for match in CARD.finditer(text)
        if luhn.is_valid(re.sub("[^0-9]", "", match[0])) and not NUMBER_BEFORE.search(text[max(match.start() - 2, 0) : match.start()])
    }
    found = list(cards(text, ()))
    assert whole <= set(found)
    assert all(len(digits) in (15, 16) and luhn.is_valid(digits) for s, e in set(found) - whole if (digits := re.sub("[^0-9]", "", text[s:e])))
    for regions in (REGIONS, ()):
        everywhere = [(m.start, m.end) for region in (*regions, None) for m in PhoneNumberMatcher(text, region, Leniency.VALID, max_tries=1_000_000)]
        assert set(phones(text, regions)) == {
            (start, end)
            for start, end in everywhere
            if PHONE.search(text[start:end]) and not DECIMAL.fullmatch(text[start:end]) and not PREFIX.fullmatch(text[max(start - 2, 0) : start])
        }


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


def test_each_kind_is_found_on_the_made_test_set() -> None:
    given = samples()
    assert given == samples()
    assert all(sample.text[sample.start : sample.end].strip() for sample in given if sample.kind)
    for kind, rated in rate([ours(sample.text) for sample in given], given).items():
        assert min(rated["recall"], rated["precision"]) >= LEAST, (kind, rated)


def test_it_imports_no_language_model_and_nothing_heavy() -> None:
    code = "import sys; from stages.pii import FINDERS, redact; redact('+49 30 901820 a@b.de', list(FINDERS), ['DE']);"
    code += "print(sorted({'spacy', 'presidio_analyzer', 'torch', 'datatrove', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
