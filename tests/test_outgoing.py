"""The guard on answers: what must not leave does not, however the answer is cut into pieces, and what is harmless does."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.schema import GuardAnswer, GuardBudget, GuardRule, GuardTopic, ServeGuard
from stages.serve.guard.finders import Answer, Span, boundary
from stages.serve.guard.outgoing import Outgoing, Watch
from stages.serve.guard.personal import Personal

LETTERS = random.Random(3)


def drawn(alphabet: str, size: int) -> str:
    return "".join(LETTERS.choice(alphabet) for _ in range(size))


KEY = "ghp_" + drawn(string.ascii_letters + string.digits, 36)
PRIVATE = "-----BEGIN RSA PRIVATE " + "KEY-----\n" + "\n".join(drawn(string.ascii_letters + string.digits + "+/", 64) for _ in range(4))
CLOSED = PRIVATE + "\n-----END RSA PRIVATE " + "KEY-----"
MARK = "KX-0A1B2C3D4E"
SYSTEM = f"You are the desk of Kestrel Outdoor. Answer in two lines: first the intent, then one friendly sentence for the customer. Internal reference {MARK}."
LEAK = "first the intent, then one friendly sentence for the customer. Internal reference"
GUARD = ServeGuard(
    rules={
        "codename": GuardRule(pattern=r"project (red|blue) (fox|hare)", action="mask", direction="out"),
        "shouting": GuardRule(pattern=r"!!!+", action="flag", direction="out"),
        "discount": GuardRule(pattern=r"\bdiscount code [a-z]+\d{4}\b", direction="out"),
        "published": GuardRule(pattern=r"our public discount code summer2026\b", action="allow", direction="both"),
        "incoming": GuardRule(pattern="tent"),
    },
    topics={"weapons": GuardTopic(words=["pipe bomb", "炸弹"], patterns=[r"\bsilencers?\b"]), "rival": GuardTopic(words=["Nordwand"], action="mask")},
    answer=GuardAnswer(personal={"email": "mask", "card": "mask", "iban": "mask", "phone": "mask", "ip": "flag"}),
    budget_ms=GuardBudget(answer=5000.0),
)
OUT = Outgoing(GUARD)
BAD = {
    "secret": [(f"Your key is {KEY}, keep it.", "Your key is <SECRET>, keep it."), (f"So:\n{CLOSED}\nDone.", "So:\n<SECRET>\nDone."), (PRIVATE, "<SECRET>")],
    "email": [("Write to bob.smith@example.com, please.", "Write to <EMAIL>, please."), ("bob@example.com", "<EMAIL>")],
    "card": [
        ("It was 4111 1111 1111 1111 then.", "It was <CARD> then."),
        ("Both 4111 1111 1111 1111 4012 8888 8888 1881 then.", "Both <CARD> <CARD> then."),
        ("4111111111111111", "<CARD>"),
    ],
    "iban": [("To GB29 NWBK 6016 1331 9268 19 it went", "To <IBAN> it went")],
    "phone": [("Call +49 30 901820 ext. 12 now", "Call <PHONE> now"), ("+1 (201) 555-0123.", "<PHONE>.")],
    "codename": [("The project  Red fox is new.", "The <CODENAME> is new."), ("Pr\u00f6ject b\u200blue hare", "<CODENAME>")],
    "topic:rival": [("Not at Nordwand, but here.", "Not at <TOPIC>, but here.")],
    "shouting": [("Hello!!! You", "Hello!!! You")],
    "ip": [("From 10.11.12.13 it came", "From 10.11.12.13 it came")],
}
REFUSED = {
    "canary": [("It is ", f"{MARK}."), ("K X ", "0 a 1 b 2 c 3 d 4 e"), ("it is ", "e4d3c2b1a0"), ("", MARK.encode().hex()), ("", "S1gtMEExQjJDM0Q0RQ==")],
    "prompt": [("Sure: ", f"{LEAK} is"), ("", LEAK.upper().replace(" ", "  "))],
    "discount": [("The ", "discount code winter2025 is yours")],
    "topic:weapons": [("A ", "pipe  bomb is"), ("这是", "炸弹吗"), ("With a ", "silencer")],
}
"""Name -> what stands before the find, and what begins with it."""
HARMLESS = [
    "Thanks for asking. We are checking with the carrier where your mat is and will write to you.",
    "Order K-77120 of 2026-11-24, 3 items, 49.90 EUR, was sent; its number is 1Z999AA10123456784.",
    "Our public discount code SUMMER2026 is valid.",
    "order_status\nHappy to help: the pipe is in the box, and no bombast. The customer is king.",
    "sha256 of the file: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "すべての荷物は発送されました。", "", "a", "KX-77", "x" * 3000,
]  # fmt: skip
CASES = [(name, text, shown) for name, cases in BAD.items() for text, shown in cases]


def watch() -> Watch:
    return OUT.watch(SYSTEM, "my card is 5555 5555 5555 4444, thanks")


def streamed(pieces: list[str]) -> Watch:
    reading = watch()
    given = "".join([*map(reading.push, pieces), reading.finish()])
    assert given == reading.text
    return reading


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(("name", "text", "shown"), CASES)
def test_a_find_is_masked_or_flagged(name: str, text: str, shown: str) -> None:
    reading = watch()
    assert reading.whole(text) == shown and not reading.refused
    assert reading.verdict().reasons == [name] and reading.verdict().allowed and reading.verdict().direction == "out"


@pytest.mark.parametrize(("name", "before", "text"), [(name, before, text) for name, cases in REFUSED.items() for before, text in cases])
def test_a_find_is_refused_and_no_letter_of_it_leaves(name: str, before: str, text: str) -> None:
    for pieces in ([before + text], list(before + text)):
        reading = streamed(pieces)
        assert reading.refused and reading.verdict().reasons == [name] and not reading.verdict().allowed
        assert before.startswith(reading.text)
        assert reading.push("more") == reading.finish() == ""


@pytest.mark.parametrize(
    ("mark", "harmless", "leaks"), [("KX-7777777", "7777777 items", "k x - 7 7 7 7 7 7 7"), ("KX-0A1B2C", "Code 0A1B2C", "KX 0a1b2c"), ("A-1", "A-1 steel", "")]
)
def test_a_short_mark_is_no_chance_find(mark: str, harmless: str, leaks: str) -> None:
    out = Outgoing(ServeGuard(answer=GuardAnswer(canary="KX-[0-9A-F]+|A-1", prompt=None)))
    system = f"Reference {mark}."
    assert out.watch(system).whole(harmless) == harmless
    reading = out.watch(system)
    reading.whole(f"It is {leaks}.")
    assert reading.refused is bool(leaks)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_harmless_leaves_as_it_is(text: str) -> None:
    for pieces in ([text], list(text)):
        reading = streamed(pieces)
        assert reading.text == text and reading.verdict().reasons == []


def test_what_the_user_said_himself_is_no_disclosure() -> None:
    assert watch().whole("You paid with 5555 5555 5555 4444.") == "You paid with 5555 5555 5555 4444."


@examples(max_examples=150, deadline=None)
@given(
    st.sampled_from(CASES),
    st.lists(st.integers(0, 10_000), max_size=40),
    st.sampled_from(["", "Sure. ", "So it is: ", "No. ", "A "]),
    st.sampled_from(["", " And more.", "\n\nBye"]),
)
def test_a_find_is_found_however_it_is_split(case: tuple[str, str, str], places: list[int], before: str, after: str) -> None:
    name, text, _ = case
    whole = watch()
    whole.whole(before + text + after)
    pieces = streamed(cut(before + text + after, places))
    assert pieces.text == whole.text and pieces.verdict().reasons == whole.verdict().reasons
    if name not in ("shouting", "ip"):
        assert text not in pieces.text


@examples(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([*(text for _, text, _ in CASES), *HARMLESS[:8], " ", "\n", "1", "-", "@", "a.b", "+"]), max_size=6),
    st.lists(st.integers(0, 10_000), max_size=60),
)
def test_a_stream_gives_what_the_whole_answer_gives(parts: list[str], places: list[int]) -> None:
    text = " ".join(parts)[:500]
    whole = watch()
    assert streamed(cut(text, places)).text == whole.whole(text)


@examples(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.lists(st.integers(0, 10_000), max_size=20))
def test_no_text_breaks_it_and_nothing_is_lost(text: str, places: list[int]) -> None:
    reading = streamed(cut(text, places))
    if not reading.verdict().reasons:
        assert reading.text == text


def test_little_is_held_back() -> None:
    reading, text = watch(), HARMLESS[0] * 5
    held = []
    for at in range(0, len(text), 4):
        reading.push(text[at : at + 4])
        held.append(min(at + 4, len(text)) - reading.settled)
    assert max(held) <= 40 and sum(held) / len(held) < 12


@pytest.mark.parametrize("unit", ["1234 ", "192.", "4111-", "DE89 ", "20260011223344, "])
def test_a_long_number_is_not_read_again_for_each_token(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, find = list[int](), Personal.find

    def counted(self: Personal, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        looked.append(len(answer.raw) - boundary(answer.raw, start))
        return find(self, answer, start, final)

    monkeypatch.setattr(Personal, "find", counted)
    text = (unit * 2000)[:1500]
    reading = streamed([text[at : at + 3] for at in range(0, len(text), 3)])
    assert reading.settled == len(text) and sum(looked) < 8 * len(text), f"{len(looked)} looks, {sum(looked)} characters"


def test_a_key_without_an_end_is_refused_at_the_bound() -> None:
    reading = streamed(list(PRIVATE + "\n" + "\n".join(drawn(string.ascii_letters, 64) for _ in range(12))))
    assert reading.refused and reading.text == "" and reading.verdict().reasons == ["secret"]


def test_a_key_that_begins_within_another_is_masked_with_it() -> None:
    text = f"{PRIVATE}\nSo:\n{CLOSED}\n-----BEGIN CERTIFICATE-----\nMIIB"
    for pieces in ([text[:512]], list(text)):
        assert "PRIVATE" not in streamed(pieces).text
    assert watch().whole(f"A\n{CLOSED}\nB\n{CLOSED}\nC") == "A\n<SECRET>\nB\n<SECRET>\nC"
    certificate = "-----BEGIN CERTIFICATE-----\n" + "A1b2" * 20 + "\n-----END CERTIFICATE-----"
    assert watch().whole(certificate) == streamed(list(certificate)).text == certificate


def test_a_cut_connection_never_flushes_what_is_held() -> None:
    reading = watch()
    assert "".join(map(reading.push, f"The key: {KEY[:30]}")) == "The key: "


def test_nothing_is_looked_for_where_nothing_is_wanted() -> None:
    nothing = GuardAnswer(secrets=None, prompt=None, canary=None)
    for settings in (ServeGuard(answer=nothing), ServeGuard(enabled=False, rules=GUARD.rules, answer=GUARD.answer)):
        reading = Outgoing(settings).watch(SYSTEM)
        assert [reading.push(p) for p in (KEY[:9], KEY[9:], MARK)] == [KEY[:9], KEY[9:], MARK]


@pytest.mark.parametrize(("exceeded", "text"), [("refuse", ""), ("flag", "Hello there, you")])
def test_a_look_that_takes_too_long(exceeded: str, text: str) -> None:
    settings = ServeGuard(budget_ms=GuardBudget(answer=1e-6, exceeded=exceeded))  # type: ignore[arg-type]
    reading = Outgoing(settings).watch()
    assert reading.whole("Hello there, you") == text
    assert reading.verdict().reasons == ["budget"] and reading.refused is (exceeded == "refuse")


def test_a_pattern_that_would_explode_is_given_up() -> None:
    settings = ServeGuard(rules={"slow": GuardRule(pattern=r"(\w|a|aa)+\d{3}", direction="out")}, budget_ms=GuardBudget(answer=30.0))
    reading = Outgoing(settings).watch()
    reading.push("a" * 400 + "!")
    assert reading.refused and reading.text == "" and reading.verdict().reasons == ["budget"] and reading.longest_ms < 2000


def test_a_rule_that_masks_with_what_it_matches_is_named() -> None:
    with pytest.raises(ConfigError, match="card masks with <CARD>, which it matches itself"):
        Outgoing(ServeGuard(rules={"card": GuardRule(pattern="card", action="mask", direction="out")}))
