"""One rule at a time trips on toy results; the champion comes from a real git and DVC repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from conf import yaml
from conf.errors import DataError, Held
from conf.schema import Absolute, Gate, Relative
from stages import champion, gate
from stages.files import write_json, write_jsonl

ENGINE = "e" * 64
GUARD = {"guard.json": "a", "weights.safetensors": "a"}
RULES = {
    "exact": Absolute(metric="evaluate.intent", direction="at_least", limit=0.6, why="customers wait"),
    "gain": Absolute(metric="evaluate.intent.gain", direction="at_least", limit=0.2),
    "spread": Absolute(metric="evaluate.intent.spread", direction="at_most", limit=0.1),
    "attacks": Absolute(metric="redteam.attack_success", direction="at_most", limit=0.1),
    "leaks": Absolute(metric="redteam.canary_leaks", direction="at_most", limit=0),
    "guard": Absolute(metric="guard.recall", direction="at_least", limit=0.9),
    "export": Absolute(metric="export.agreement", direction="at_least", limit=0.9),
}


def results() -> dict[str, Any]:
    return {
        "evaluate": {
            "digest": ENGINE,
            "tasks": {"intent": {"score": 0.8, "spread": 0.05, "gain": 0.5, "n": 500, "metric": "exact_match", "higher_is_better": True}},
        },
        "redteam": {"digest": ENGINE, "attack_success": 0.1, "false_alarms": 0.0, "canary_leaks": 0, "guard": {"digest": GUARD}},
        "export": {"digest": ENGINE, "agreement": 0.99},
        "guard": {"digest": GUARD, "recall": 0.95, "false_alarms": 0.002},
    }


def rows(right: int, wrong: int, phrasing: str = "plain", start: int = 0) -> list[dict[str, Any]]:
    """So many right rows, then so many wrong ones; `start` shifts which are which."""
    number = right + wrong
    return [{"doc_hash": f"{n:04d}", "doc_id": n, "phrasing": phrasing, "score": float((n - start) % number < right)} for n in range(number)]


def place(found: dict[str, Any], settings: Gate, samples: list[dict[str, Any]] | None = None) -> None:
    for name, path in gate.SOURCES.items():
        if name in found:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found[name]), encoding="utf-8")
    if samples is not None:
        write_jsonl(Path("models/evaluate/samples/intent.jsonl"), samples)
    Path("params.yaml").write_text(yaml.dump({"gate": asdict(settings)}), encoding="utf-8")


def verdict() -> dict[str, Any]:
    return json.loads(gate.VERDICT.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_good_model_without_a_champion_is_promoted_and_the_verdict_says_so() -> None:
    place(results(), Gate(absolute=RULES, relative={"intent": Relative(task="intent")}))
    gate.main()
    found, first = verdict(), gate.VERDICT.read_bytes()
    assert (found["outcome"], found["promote"], found["digest"], found["champion"]) == ("promote", True, ENGINE, None)
    assert found["reasons"] == ["no champion is pinned in gate.champion: only the absolute rules apply, and 1 relative rules wait for one"]
    assert [(r["name"], r["value"], r["passed"]) for r in found["rules"]] == [
        ("attacks", 0.1, True),
        ("exact", 0.8, True),
        ("export", 0.99, True),
        ("gain", 0.5, True),
        ("guard", 0.95, True),
        ("leaks", 0, True),
        ("spread", 0.05, True),
    ]
    gate.main()
    assert gate.VERDICT.read_bytes() == first
    place(results(), Gate(absolute=RULES | {"exact": Absolute(metric="evaluate.intent", direction="at_least", limit=0.61, why="customers wait")}))
    gate.main()
    assert gate.VERDICT.read_bytes() != first


def change(source: str, **values: object) -> Callable[[dict[str, Any]], None]:
    return lambda found: found[source].update(values)


def task(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["evaluate"]["tasks"]["intent"].update(values)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (task(score=0.5999), "exact: evaluate.intent is 0.5999, and must be at least 0.6 (customers wait)"),
        (task(score=float("nan")), "exact: evaluate.intent is NaN, not a number"),
        (task(score=float("inf")), "exact: evaluate.intent is Infinity, not a number"),
        (task(score="N/A"), 'exact: evaluate.intent is "N/A", not a number'),
        (task(score=None), "exact: evaluate.intent is null, not a number"),
        (task(score=True), "exact: evaluate.intent is true, not a number"),
        (task(n=0), 'exact: evaluate.intent is "of no rows", not a number'),
        (task(spread=0.11), "spread: evaluate.intent.spread is 0.11, and must be at most 0.1"),
        (lambda f: f["evaluate"]["tasks"]["intent"].pop("gain"), "gain: evaluate.intent.gain is null, not a number"),
        (lambda f: f["evaluate"].update(tasks={}), "exact: nothing measured evaluate.intent"),
        (lambda f: f["evaluate"].update(tasks={"intend": {"n": 1}}), "exact: nothing measured evaluate.intent (did you mean evaluate.intend?)"),
        (change("redteam", canary_leaks=1), "leaks: redteam.canary_leaks is 1, and must be at most 0"),
        (change("redteam", digest="f" * 64), "the results are not of one and the same engine"),
        (change("export", digest=None), "the results are not of one and the same engine"),
        (change("guard", recall=0.89), "guard: guard.recall is 0.89, and must be at least 0.9"),
        (change("guard", recall=None), "guard.recall is null, not a number"),
        (change("guard", digest={"guard.json": "b"}), "models/redteam/result.json and models/guard/result.json are not of one and the same guard"),
        (change("redteam", guard={}), "are not of one and the same guard"),
        (lambda f: f.pop("guard"), "models/guard/result.json is missing"),
        (lambda f: f.pop("redteam"), "models/redteam/result.json is missing"),
        (lambda f: f.update(export=[]), "export: export.agreement is null"),
    ],
)
def test_one_broken_rule_holds_with_its_reason_and_the_verdict_stays_readable(edit: Callable[[dict[str, Any]], None], reason: str) -> None:
    found = results()
    edit(found)
    place(found, Gate(absolute=RULES))
    with pytest.raises(Held) as held:
        gate.main()
    assert reason in held.value.what
    assert held.value.exit_code == 1
    assert (verdict()["outcome"], verdict()["promote"]) == ("hold", False)
    assert any(reason in r for r in verdict()["reasons"])


def test_an_empty_rule_list_and_an_uncompared_champion_hold() -> None:
    settings = Gate(absolute=RULES, champion="a" * 40)
    assert "gate.relative is empty" in str(gate.decide(settings, results(), [], lambda rule: pytest.fail("nothing to weigh"))["reasons"])
    settings.absolute.clear()
    assert gate.decide(settings, results(), [], None)["outcome"] == "hold"


def weigh(old: list[dict[str, Any]], new: list[dict[str, Any]], rule: Relative, alpha: float = 0.05, **entry: object) -> dict[str, Any]:
    shape = {"metric": "exact_match", "higher_is_better": True} | entry
    return champion.relate(
        {"r": rule},
        alpha,
        lambda r: champion.weigh(
            r,
            (shape, champion.read_pairs(old, "champion")),  # type: ignore[arg-type]
            (shape, champion.read_pairs(new, "candidate")),
        ),
    )[0]


def test_the_three_outcomes_and_the_smallest_effect_that_could_be_seen() -> None:
    rule = Relative(task="intent", margin=0.03)
    same = weigh(rows(400, 100), rows(400, 100), rule)
    assert (same["outcome"], same["method"], same["difference"]) == ("promote", "exact", 0)
    worse = weigh(rows(400, 100), rows(340, 160), rule)
    assert worse["outcome"] == "hold" and "worse by more than the margin" in worse["reason"]
    unclear = weigh(rows(400, 100), rows(390, 110), rule)
    assert unclear["outcome"] == "inconclusive"
    assert "minimum detectable effect 0.0" in unclear["reason"]
    assert unclear["rows_needed"] > 0
    small = weigh(rows(16, 4), rows(16, 4), rule)
    assert small["outcome"] == "inconclusive" and f"about {small['rows_needed']} would do" in small["reason"]


def test_less_is_better_turns_the_comparison_round() -> None:
    rule = Relative(task="intent", margin=0.03)
    assert weigh(rows(100, 400), rows(160, 340), rule, higher_is_better=False)["outcome"] == "hold"
    assert weigh(rows(160, 340), rows(100, 400), rule, higher_is_better=False)["outcome"] == "promote"


def test_phrasings_of_a_row_are_one_observation() -> None:
    rule = Relative(task="intent", margin=0.03)
    old, new = rows(400, 100) + rows(400, 100, "other"), rows(390, 110) + rows(400, 100, "other")
    found = weigh(old, new, rule)
    assert (found["rows"], found["method"], found["difference"]) == (500, "bootstrap", pytest.approx(-0.01))


def grouped(rows: list[dict[str, Any]], size: int = 4) -> list[dict[str, Any]]:
    """The same rows, the first so many of one customer, and so on."""
    return [row | {"group": f"customer {n // size}"} for n, row in enumerate(rows)]


def test_rows_of_a_group_are_resampled_together() -> None:
    rule = Relative(task="intent", margin=0.03)
    alone, together = (weigh(of(rows(400, 100)), of(rows(392, 108)), rule) for of in (list, grouped))
    assert (alone["method"], alone["groups"]) == ("exact", None)
    assert (together["method"], together["groups"], together["rows"]) == ("grouped bootstrap", 125, 500)
    assert together["design_effect"] == pytest.approx(4, rel=0.02) and "500 rows in 125 groups" in together["reason"]
    assert (alone["outcome"], together["outcome"]) == ("promote", "inconclusive"), "eight losses of two customers are two"
    assert together["rows_needed"] > 3 * alone["rows_needed"]
    single = weigh([row | {"group": f"{n}"} for n, row in enumerate(rows(400, 100))], [row | {"group": f"{n}"} for n, row in enumerate(rows(392, 108))], rule)
    assert {**single, "groups": None} == alone, "groups of one row each stand alone"


def test_a_row_without_a_group_stands_alone() -> None:
    rule = Relative(task="intent", margin=0.03)
    some = [(row | {"group": "" if n % 2 else f"customer {n // 8}"}) for n, row in enumerate(rows(400, 100))]
    found = weigh(some, some, rule)
    assert found["groups"] == 250 + 63


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (list, grouped, "grouped differently: 500 of 500 rows, as doc_hash 0000, in '' and in 'customer 0' (evaluate the champion with the task's group_by"),
        (grouped, list, "grouped differently: 500 of 500 rows"),
        (grouped, lambda of: grouped(of, 5), "grouped differently: 490 of 500 rows, as doc_hash 0004, in 'customer 1' and in 'customer 0'"),
        (grouped, lambda of: [*grouped(of), of[0] | {"phrasing": "other", "group": "x"}], "row 0000 of the candidate is of two groups"),
    ],
)
def test_other_groups_hold(old: Callable[[Any], Any], new: Callable[[Any], Any], reason: str) -> None:
    found = weigh(old(rows(400, 100)), new(rows(400, 100)), Relative(task="intent"))
    assert found["outcome"] == "hold"
    assert reason in found["reason"]


def test_the_verdict_has_an_interval_that_agrees_with_the_outcome() -> None:
    rule = Relative(task="intent", margin=0.03)
    for right, outcome in ((402, "promote"), (340, "hold"), (390, "inconclusive")):
        found = weigh(rows(400, 100), rows(right, 500 - right), rule)
        assert found["outcome"] == outcome
        assert found["low"] <= found["difference"] <= found["high"]
        assert found["confidence"] == 0.9
        assert {"promote": found["low"] > -0.03, "hold": found["high"] < -0.03, "inconclusive": found["low"] < -0.03 < found["high"]}[outcome]


def test_an_inconclusive_result_says_how_many_rows_would_settle_it_and_when_none_would() -> None:
    unclear = weigh(rows(400, 100), rows(390, 110), Relative(task="intent", margin=0.03))
    assert f"about {unclear['rows_needed_as_seen']} if the true difference is the one seen" in unclear["reason"]
    assert unclear["rows_needed_as_seen"] > 500
    at_the_margin = weigh(rows(400, 100), rows(385, 115), Relative(task="intent", margin=0.03))
    assert at_the_margin["rows_needed_as_seen"] is None and "no number if the true difference is the one seen" in at_the_margin["reason"]
    equal = weigh(rows(400, 100), rows(400, 100), Relative(task="intent", margin=0.0))
    assert equal["rows_needed"] is None and "no number would do for an equal model" in equal["reason"]
    few = weigh(rows(2, 1), rows(2, 1), Relative(task="intent", margin=0.0))
    assert few["minimum_detectable_effect"] is None and "minimum detectable effect none" in few["reason"]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda new: new.pop(), "asked different questions: 1 of 500 differ, as doc_hash 0499"),
        (lambda new: new[0].update(doc_hash="beef"), "asked different questions: 2 of 501"),
        (lambda new: new[0].update(phrasing="other"), "asked different questions"),
        (lambda new: new.append(new[0]), "asked different questions: 1 of 500"),
        (lambda new: new[0].update(score=None), "has the score None"),
        (lambda new: new[0].update(score=float("nan")), "has the score nan"),
        (lambda new: new[0].update(score=0.5), "neither 0 nor 1: choose test: bootstrap"),
        (lambda new: new.clear(), "no samples"),
    ],
)
def test_rows_that_cannot_be_paired_hold(edit: Callable[[list[dict[str, Any]]], None], reason: str) -> None:
    new = rows(400, 100)
    edit(new)
    found = weigh(rows(400, 100), new, Relative(task="intent"))
    assert found["outcome"] == "hold"
    assert reason in found["reason"]


def test_another_metric_is_not_compared() -> None:
    pairs = champion.read_pairs(rows(4, 1), "champion")
    with pytest.raises(DataError, match="metric='acc', the candidate with 'exact_match'"):
        champion.weigh(Relative(task="intent"), ({"metric": "acc"}, pairs), ({"metric": "exact_match"}, pairs))


def test_holm_over_tasks_is_stricter_than_each_alone() -> None:
    rule = Relative(task="intent", margin=0.03)
    shape = {"metric": "exact_match", "higher_is_better": True}

    def weighed(rule: Relative) -> Any:
        return champion.weigh(rule, (shape, champion.read_pairs(rows(400, 100), "champion")), (shape, champion.read_pairs(rows(392, 108), "candidate")))  # type: ignore[arg-type]

    alone = champion.relate({"a": rule}, 0.05, weighed)[0]
    both = champion.relate({"a": rule, "b": rule}, 0.05, weighed)
    assert both[0]["p_not_worse"] == pytest.approx(2 * alone["p_not_worse"])
    assert (alone["outcome"], both[0]["outcome"]) == ("promote", "inconclusive")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A repository whose first commit holds a champion that has 400 of 500 rows right, kept by DVC; and that commit."""
    folder = tmp_path_factory.mktemp("repository")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": ""}

    def call(*words: str) -> str:
        return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    write_json(folder / "models/evaluate/scores.json", results()["evaluate"])
    write_jsonl(folder / "models/evaluate/samples/intent.jsonl", rows(400, 100))
    call("git", "init", "-q")
    call(sys.executable, "-m", "dvc", "init", "-q")
    call(sys.executable, "-m", "dvc", "config", "core.analytics", "false")
    call(sys.executable, "-m", "dvc", "add", "-q", "models/evaluate")
    call("git", "add", "-A")
    call("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "champion")
    return folder, call("git", "rev-parse", "HEAD")


@pytest.mark.parametrize(("right", "outcome"), [(402, "promote"), (340, "hold"), (390, "inconclusive")])
def test_the_champion_is_read_from_git_and_dvc(repository: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, right: int, outcome: str) -> None:
    folder, revision = repository
    monkeypatch.chdir(folder)
    settings = Gate(absolute=RULES, relative={"intent": Relative(task="intent", margin=0.03)}, champion=revision)
    place(results(), settings, rows(right, 500 - right))
    if outcome == "promote":
        gate.main()
    else:
        with pytest.raises(Held, match=rf"{outcome}:\n.*minimum detectable effect"):
            gate.main()
    assert (verdict()["outcome"], verdict()["champion"]) == (outcome, revision)
    assert verdict()["relative"][0]["rows"] == 500


def test_inconclusive_goes_through_only_where_the_configuration_says_so(repository: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, revision = repository
    monkeypatch.chdir(folder)
    place(results(), Gate(absolute=RULES, relative={"intent": Relative(task="intent", margin=0.03)}, champion=revision, inconclusive="promote"), rows(390, 110))
    gate.main()
    assert (verdict()["outcome"], verdict()["promote"]) == ("inconclusive", True)
    assert "gate.inconclusive is promote" in verdict()["reasons"][-1]


def test_a_champion_that_cannot_be_had_holds(repository: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, revision = repository
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    rules = {"intent": Relative(task="intent"), "other": Relative(task="other")}
    place(results(), Gate(absolute=RULES, relative=rules, champion="0" * 40), rows(400, 100))
    with pytest.raises(Held, match=f"of the champion {'0' * 40} cannot be read"):
        gate.main()
    shutil.rmtree(".dvc/cache")
    place(results(), Gate(absolute=RULES, relative=rules, champion=revision), rows(400, 100))
    with pytest.raises(Held, match=f"of the champion {revision} cannot be read.*dvc fetch") as held:
        gate.main()
    assert "scores.json has no task other" in held.value.what
    assert verdict()["promote"] is False


def test_a_crash_leaves_no_verdict_that_promotes(monkeypatch: pytest.MonkeyPatch) -> None:
    place(results(), Gate(absolute=RULES, relative={"intent": Relative(task="intent")}, champion="a" * 40))

    def crash(revision: str, task: str) -> None:
        raise RuntimeError("a store's own error")

    monkeypatch.setattr(gate, "read_champion", crash)
    with pytest.raises(RuntimeError):
        gate.main()
    assert verdict()["promote"] is False
    assert "the gate did not finish" in verdict()["reasons"][0]


@pytest.mark.parametrize("name", ["support", "banking77"])
def test_shipped_gates_have_a_reason_for_every_limit(name: str) -> None:
    declared = yaml.read(Path(__file__).parent.parent / f"conf/gate/{name}.yaml")
    settings = Gate(absolute={k: Absolute(**v) for k, v in declared["absolute"].items()}, relative={k: Relative(**v) for k, v in declared["relative"].items()})
    assert all(rule.why for rule in settings.absolute.values())
