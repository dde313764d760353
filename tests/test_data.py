"""The made data of the default experiment, and the configuration that reads it."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conf.yaml import read
from stages.files import write_jsonl
from stages.records import Record
from stages.sources.files import listing

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "data/raw/support"
MADE = ("tickets.jsonl", "forum.html", "stories.jsonl", "attacks.jsonl", "benign.jsonl")
STARTS = ("Thanks for", "Sorry about", "Happy to help")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SUPPORT / name).read_text(encoding="utf-8").splitlines()]


def posts() -> list[tuple[str, str, str, str]]:
    from stages.sources.html import html_rows

    dataset = datasets()["forum"]
    found = html_rows("forum", (SUPPORT / "forum.html").read_text(encoding="utf-8"), dataset["rows_at"], dataset["fields"])
    return [(str(r["group"]), str(r["text"]), str(r["label"]), str(r["completion"])) for r in found]


def datasets() -> dict[str, Any]:
    found: dict[str, Any] = read(ROOT / "conf/collect/support.yaml")["datasets"]
    return found


def complete() -> list[tuple[str, str, str, str]]:
    """(customer, message, intent, reply) of tickets and forum, where none is missing."""
    pairs = [tuple(str(r[k] or "").strip() for k in ("customer_id", "message", "intent", "reply")) for r in rows("tickets.jsonl")] + posts()
    return [p for p in pairs if all(p)]


INTENTS = sorted({intent for _, _, intent, _ in complete()})


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_make_writes_the_committed_bytes(tmp_path: Path, hash_seed: str) -> None:
    subprocess.run([sys.executable, SUPPORT / "make.py", tmp_path], check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(MADE)
    for name in MADE:
        assert (tmp_path / name).read_bytes() == (SUPPORT / name).read_bytes(), f"{name}: run `python data/raw/support/make.py` and pin the new digest"


def test_pinned_digests_are_those_of_the_files() -> None:
    for name, dataset in datasets().items():
        origin = dataset["origin"]
        files = {p.relative_to(ROOT).as_posix(): p for p in sorted(ROOT.glob(origin["path"]))}
        assert files, name
        assert listing(files) == origin["sha256"], f"{name}: conf/collect/support.yaml pins another file"


def test_size_and_balance() -> None:
    assert all(p.stat().st_size < 450 * 1024 for p in SUPPORT.rglob("*") if p.is_file())
    assert len(rows("tickets.jsonl")) >= 1300
    assert len(posts()) >= 150
    supervised = complete()
    assert len(supervised) + len(rows("tickets.jsonl")) * 0.03 >= 1500
    counts = Counter(intent for _, _, intent, _ in supervised)
    assert len(counts) == 12
    assert max(counts.values()) < 3 * min(counts.values())
    assert len({intent.split("_")[0] for intent in counts}) == 12  # the first word alone tells them apart
    per_customer = Counter(r["customer_id"] for r in rows("tickets.jsonl"))
    assert sum(n > 1 for n in per_customer.values()) > 200
    assert len(list((SUPPORT / "articles").glob("*.md"))) >= 12
    assert all(200 <= len(p.read_text(encoding="utf-8").split()) <= 500 for p in (SUPPORT / "articles").glob("*.md"))
    corpus = sum(len(r["text"]) for r in rows("stories.jsonl")) + sum(p.stat().st_size for p in (SUPPORT / "articles").glob("*.md"))
    assert 200_000 < corpus < 400_000


def test_answers_keep_the_house_style() -> None:
    by_intent: dict[str, set[str]] = {}
    for _, _, intent, reply in complete():
        if reply.startswith("Thanks for writing. Please tell us"):
            continue  # the answer to junk
        assert reply.startswith(STARTS)
        assert len(reply.split()) <= 22
        assert len(re.findall(r"[.!?]", reply)) <= 2
        by_intent.setdefault(intent, set()).add(reply)
    assert min(map(len, by_intent.values())) >= 4


def test_messages_vary() -> None:
    messages = [m for _, m, _, _ in complete()]
    lengths = sorted(len(m.split()) for m in messages)
    assert lengths[len(lengths) // 20] >= 5
    assert lengths[len(lengths) * 19 // 20] <= 45
    openings = Counter(" ".join(m.lower().split()[:4]) for m in messages)
    assert openings.most_common(1)[0][1] < 0.04 * len(messages)


def test_the_dirt_is_there() -> None:
    import ftfy

    tickets = rows("tickets.jsonl")
    for field in ("message", "intent", "reply"):
        assert 0.005 < sum(not (r[field] or "").strip() for r in tickets) / len(tickets) < 0.05, field
    texts = [r["message"] for r in tickets if (r["message"] or "").strip()]
    folded = Counter(" ".join(t.lower().split()) for t in texts)
    assert 0.03 < sum(n - 1 for n in folded.values()) / len(texts) < 0.06
    assert sum("â€™" in t and "â€™" not in ftfy.fix_text(t) for t in texts) >= 10
    assert sum(html.unescape(t) != t for t in texts) >= 10
    assert sum(t != t.strip() or "  " in t for t in texts) >= 30
    assert sum(t.isupper() and len(t) > 20 for t in texts) >= 5
    assert sum(t == t.lower() for t in texts) >= 100
    injection = re.compile(r"(?i)ignore (your|all|the)|system( note)?:|your rules|system prompt|you are now|new (task|instruction)")
    injected = [r for r in tickets if injection.search(r["message"] or "")]
    assert len(injected) >= 20
    assert {r["intent"] for r in injected if (r["intent"] or "").strip()} <= set(INTENTS)


def test_personal_data_is_findable_and_invented() -> None:
    import phonenumbers
    from stdnum import iban, luhn

    text = "\n".join(r["message"] or "" for r in rows("tickets.jsonl"))
    ibans = re.findall(r"\b(?:DE|GB|AT)\d\d[A-Z0-9 ]{12,32}\d", text)
    assert len(ibans) >= 15
    assert sum(iban.is_valid(number) for number in ibans) >= 0.8 * len(ibans)
    cards = re.findall(r"\b(?:[3-6]\d{3}[ -]?\d{4,6}[ -]?\d{4,5}[ -]?\d{0,4})\b", text)
    assert sum(luhn.is_valid(re.sub(r"\D", "", number)) for number in cards) >= 15
    assert len(list(phonenumbers.PhoneNumberMatcher(text, "US"))) >= 10
    assert {re.split(r"[@.]", m.lower())[-2] for m in re.findall(r"@[\w.]+\w", text)} == {"example"}
    assert all(m.startswith(("192.0.2.", "198.51.100.", "203.0.113.")) for m in re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text))


def test_attacks_and_benign_prompts() -> None:
    attacks, benign = rows("attacks.jsonl"), rows("benign.jsonl")
    assert Counter(r["family"] for r in attacks).keys() == {"injection", "extraction", "jailbreak", "exfiltration"}
    assert len(attacks) >= 60
    assert len(benign) >= 150
    assert not {r["text"] for r in attacks} & {r["text"] for r in benign}
    for word in ("ignore", "system", "instructions", "password", "pretend"):
        assert sum(word in r["text"].lower() for r in benign) >= 3, word


def test_it_says_that_it_is_made_and_under_which_licence() -> None:
    readme = (SUPPORT / "README.md").read_text(encoding="utf-8")
    assert "all of it made" in readme.splitlines()[0]
    assert "Apache-2.0" in readme
    assert "Made for Trunkline" in (SUPPORT / "forum.html").read_text(encoding="utf-8")
    assert {d["origin"]["licence"] for d in datasets().values()} == {"Apache-2.0"}
    assert {n for n, d in datasets().items() if d["origin"]["classification"] == "internal"} == {"tickets"}


# ---------------------------------------------------------------- the configuration around it


def test_one_list_of_intents() -> None:
    tasks = ROOT / "conf/evaluate/tasks"
    choice = read(tasks / "support_intent_choice.yaml")
    assert len(choice["doc_to_choice"]) == len(INTENTS)
    style = read(tasks / "support_style.yaml")["filter_list"][0]["filter"][0]["regex_pattern"]
    for place in (
        choice["doc_to_target"],
        style,
        read(ROOT / "conf/redteam/support.yaml")["on_task"],
    ):
        assert sorted(set(re.findall(r"\b[a-z]+_[a-z]+\b", place))) == INTENTS
    assert len(set(read(tasks / "banking77_choice.yaml")["doc_to_choice"])) == 77
    guide = (SUPPORT / "articles/house-style.md").read_text(encoding="utf-8")
    assert all(intent.replace("_", " ") in guide for intent in INTENTS)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("refund_status\nThanks for asking. Please send us your order number and we will check your refund.", True),
        ("refund_status\nHappy to help with the tent.", True),
        ("refund_status", False),
        ("refund_status\nPlease send us your order number.", False),
        ("gift_card\nThanks for asking. Please send us your order number.", False),
        ("refund_status\nThanks for asking. We will look. You will get it. Soon.", False),
        ("refund_status\nThanks for " + "very " * 21 + "much.", False),
        ("refund_status\nThanks for asking. Bye.\nAnd more.", False),
        ("Thanks for asking.", False),
        ("x " * 300, False),
    ],
)
def test_style_pattern(answer: str, kept: bool) -> None:
    pattern = read(ROOT / "conf/evaluate/tasks/support_style.yaml")["filter_list"][0]["filter"][0]["regex_pattern"]
    assert bool(re.findall(pattern, answer)) == kept


def test_every_answer_in_the_data_has_the_style_that_is_measured() -> None:
    pattern = read(ROOT / "conf/evaluate/tasks/support_style.yaml")["filter_list"][0]["filter"][0]["regex_pattern"]
    on_task = read(ROOT / "conf/redteam/support.yaml")["on_task"]
    for _, _, intent, reply in complete():
        assert re.findall(pattern, f"{intent}\n{reply}"), reply
        assert re.fullmatch(on_task, f"{intent}\n{reply}"), reply


def scores(names: list[str], answer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, metric: str) -> dict[str, float]:
    """Run own lm-eval tasks on three rows with a model whose answers are known."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    from stages.tasks import load_tasks

    class Known(LM):  # type: ignore[misc]
        def generate_until(self, requests: Any) -> list[str]:
            return [answer(r.args[0], r.args[1]) for r in requests]

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return [(answer(*r.args), False) for r in requests]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise NotImplementedError

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return "".join(f"<{m['role']}>{m['content']}" for m in chat_history)

        @property
        def tokenizer_name(self) -> str:
            return "known"

    made = [
        Record(id=str(n), source="s", licence="l", classification="public", text=text, label=label, completion=completion, meta=meta).row()
        for n, (text, label, completion, meta) in enumerate(
            [
                ("Where is my parcel?", "order_status", "Thanks for asking.", {"channel": "chat"}),
                ("I was charged twice.", "payment_failed", "Sorry about that.", {"title": "thread"}),
                ("Delete me.", "delete_account", "Thanks for your request.", {}),
            ]
        )
    ]
    piqa = [
        Record(
            id="0",
            source="piqa",
            licence="AFL-3.0",
            classification="public",
            text="Make a pillow.",
            completion="B. Blow into a bag.\n",
            meta={"options": "A. Blow into a can. \nB. Blow into a bag.\n"},
        ).row(),
        Record(
            id="1",
            source="piqa",
            licence="AFL-3.0",
            classification="public",
            text="It's open?",
            completion='A. Don\'t "push".',
            meta={"options": 'A. Don\'t "push".\nB. Push.'},
        ).row(),
    ]
    monkeypatch.chdir(folder)
    (folder / "conf/evaluate").mkdir(parents=True)
    (folder / "conf/evaluate/tasks").symlink_to(ROOT / "conf/evaluate/tasks")
    for name in ("test", "validation"):
        write_jsonl(folder / f"data/preprocess/{name}.jsonl", made)
    write_jsonl(folder / "data/collect/piqa.jsonl", piqa)
    found: Any = evaluate(Known(), {"tasks": load_tasks(names, "evaluate.tasks")}, bootstrap_iters=0, apply_chat_template=True, system_instruction="Sys")
    return {name: next(v for k, v in found["results"][name].items() if k.split(",")[0] == metric) for name in names}


def test_intent_tasks_score_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(prompt: str, arguments: dict[str, Any]) -> str:
        assert arguments["until"] == ["\n"]
        assert prompt.startswith("<system>Sys<user>")
        return "Order_Status " if "parcel" in prompt else "payment_failed" if "charged" in prompt else "the intent is delete_account"

    names = ["support_intent", "support_intent_direct", "support_intent_forwarded", "banking77_intent"]
    assert scores(names, answer, tmp_path, monkeypatch, "exact_match") == dict.fromkeys(names, pytest.approx(2 / 3))


def test_style_task_scores_the_whole_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(prompt: str, arguments: dict[str, Any]) -> str:
        return "order_status\nThanks for asking. We will look." if "parcel" in prompt else "Thanks for asking."

    assert scores(["support_style"], answer, tmp_path, monkeypatch, "exact_match") == {"support_style": pytest.approx(1 / 3)}


def test_choice_tasks_know_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {
        "parcel": "the status of an order",
        "charged": "a failed payment",
        "Delete": "the status of a refund",
        "pillow": "Blow into a bag.",
        "open": 'Don\'t "push".',
    }

    def answer(prompt: str, choice: str) -> float:
        assert "A. " not in choice
        return 0.0 if any(word in prompt and choice.strip() == name for word, name in right.items()) else -1.0

    assert scores(["support_intent_choice", "piqa_local"], answer, tmp_path, monkeypatch, "acc") == {
        "support_intent_choice": pytest.approx(2 / 3),
        "piqa_local": pytest.approx(1.0),
    }
