"""Toy rows that break exactly one expectation each; Great Expectations itself runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf import yaml
from conf.errors import DataError
from conf.schema import Expectation, Pii
from stages import tables, validate
from stages.expectations import build, check, harmless, plain, scrub, vacuous
from stages.files import sha256, write_jsonl
from stages.records import Record

ROOT = Path(__file__).parent.parent
Edit = Callable[[dict[str, list[dict[str, Any]]]], object]

SUITE = {
    "train-rows": Expectation(expect="expect_table_row_count_to_be_between", table="train", kwargs={"min_value": 4}, why="too few to learn from"),
    "columns": Expectation(
        expect="expect_table_columns_to_match_set",
        kwargs={
            "column_set": [
                "id",
                "source",
                "licence",
                "classification",
                "text",
                "completion",
                "label",
                "group",
                "messages",
                "meta",
                "split",
                "tokens",
                "completion_tokens",
                "pii",
                "overlap",
                "label_share",
                "meta.channel",
            ]
        },
    ),
    "label-present": Expectation(expect="expect_column_values_to_not_be_null", kwargs={"column": "label"}),
    "row-unique": Expectation(expect="expect_compound_columns_to_be_unique", kwargs={"column_list": ["source", "id"]}),
    "text-unique": Expectation(expect="expect_column_values_to_be_unique", table="train", kwargs={"column": "text"}),
    "length": Expectation(expect="expect_column_values_to_be_between", kwargs={"column": "tokens", "min_value": 3, "max_value": 20}),
    "turns": Expectation(expect="expect_column_values_to_be_in_set", kwargs={"column": "messages", "value_set": ["user,assistant"]}),
    "labels": Expectation(expect="expect_column_distinct_values_to_equal_set", table="train", kwargs={"column": "label", "value_set": ["cancel", "refund"]}),
    "balance": Expectation(expect="expect_column_max_to_be_between", table="train", kwargs={"column": "label_share", "max_value": 0.7}, why="too easy"),
    "licence": Expectation(expect="expect_column_values_to_be_in_set", kwargs={"column": "licence", "value_set": ["Apache-2.0"]}),
    "channel": Expectation(expect="expect_column_values_to_be_in_set", kwargs={"column": "meta.channel", "value_set": ["mail"]}),
    "personal-data": Expectation(expect="expect_column_values_to_be_null", kwargs={"column": "pii"}, why="it would be repeated"),
    "overlap": Expectation(expect="expect_column_values_to_be_in_set", kwargs={"column": "overlap", "value_set": [0]}),
    "only-refunds": Expectation(
        expect="expect_column_value_lengths_to_be_between",
        kwargs={
            "column": "text",
            "min_value": 5,
            "row_condition": {"type": "comparison", "column": {"name": "label"}, "operator": "==", "parameter": "refund"},
        },
    ),
}


def row(number: int, text: str, label: str) -> dict[str, Any]:
    messages: list[Any] = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{label}\nThanks."}]
    return Record(
        id=str(number),
        source="desk",
        licence="Apache-2.0",
        classification="public",
        text=text,
        completion=f"{label}\nThanks.",
        label=label,
        messages=messages,
        meta={"channel": "mail"},
    ).row()


def toy() -> dict[str, list[dict[str, Any]]]:
    train = ["where is my money", "stop my order", "money back please", "cancel it now"]
    return {
        "train": [row(n, text, "refund" if n % 2 == 0 else "cancel") for n, text in enumerate(train)],
        "validation": [row(10, "give my cash back", "refund")],
        "test": [row(20, "no refund seen yet", "refund"), row(21, "call the order off", "cancel")],
    }


def prepare(splits: dict[str, list[dict[str, Any]]], suite: dict[str, Expectation] = SUITE, examples: int = 3) -> None:
    """Write what preprocess and compose would have left in the working directory."""
    for name, rows in splits.items():
        write_jsonl(Path(f"data/preprocess/{name}.jsonl"), rows)
    Path("params.yaml").write_text(
        yaml.dump({"validate": {"expectations": {n: asdict(e) for n, e in suite.items()}, "examples": examples}, "preprocess": {"pii": asdict(Pii())}}),
        encoding="utf-8",
    )


def result() -> dict[str, Any]:
    return json.loads(Path("data/validate/result.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_good_rows_pass_and_two_runs_write_the_same_bytes() -> None:
    prepare(toy())
    validate.main()
    first = sha256(Path("data/validate"))
    validate.main()
    assert sha256(Path("data/validate")) == first
    found = result()
    assert found["success"] is True
    assert found["rows"] == {"train": 4, "validation": 1, "test": 2, "rows": 7}
    assert set(found["expectations"]) == set(SUITE)
    assert found["expectations"]["balance"]["observed"] == 0.5


@pytest.mark.slow
def test_another_hash_seed_in_another_folder_writes_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for seed in ("0", "7"):
        folder = tmp_path / seed
        folder.mkdir()
        os.chdir(folder)
        splits = toy()
        splits["train"][0]["licence"] = "proprietary"
        prepare(splits, SUITE | {"raising": Expectation(expect="expect_column_values_to_match_regex", kwargs={"column": "text", "regex": "("})})
        code = "from stages.validate import main\nfrom conf.errors import DataError\ntry: main()\nexcept DataError: pass\nelse: raise SystemExit(3)"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)})
        digests.add(sha256(folder / "data/validate"))
    assert len(digests) == 1


def set_all(split: str, field: str, value: object) -> Edit:
    return lambda splits: [r.__setitem__(field, value) for r in splits[split]]


BREAKS: dict[str, tuple[Edit, str, str]] = {
    "train-rows": (lambda s: (s["train"].pop(), s["train"].pop()), "observed 2", "too few to learn from"),
    "columns": (lambda s: [r.pop("group") for rows in s.values() for r in rows], "'missing': ['group']", ""),
    "label-present": (lambda s: s["test"][0].update(label=" "), '"unexpected_count": 1', "desk/20"),
    "row-unique": (lambda s: s["test"][0].update(id="1"), '"unexpected_count": 2', "desk/1"),
    "text-unique": (lambda s: s["train"][3].update(text=s["train"][1]["text"]), '"unexpected_count": 2', "desk/1: stop my order"),
    "length": (lambda s: s["train"][0]["messages"][0].update(content="help " * 30), '"unexpected_count": 1', "desk/0: 33"),
    "turns": (lambda s: s["train"][0]["messages"].reverse(), '"unexpected_count": 1', "desk/0: assistant,user"),
    "labels": (lambda s: s["train"][1].update(label="weather"), "weather", "desk/1: weather"),
    "balance": (lambda s: s["train"][1].update(label="refund"), "observed 0.75", "why: too easy"),
    "licence": (lambda s: s["train"][0].update(licence="proprietary"), '"unexpected_count": 1', "desk/0: proprietary"),
    "channel": (lambda s: s["train"][0].update(meta={"channel": "fax"}), '"unexpected_count": 1', "desk/0: fax"),
    "personal-data": (lambda s: s["test"][1].update(completion="cancel\nWrite to jane.doe@example.com"), '"unexpected_count": 1', "desk/21: email"),
    "overlap": (lambda s: s["train"][0].update(text="  Call THE order—off!! "), '"unexpected_count": 2', "desk/0: 1"),
    "only-refunds": (lambda s: s["train"][0].update(text="cash"), '"unexpected_count": 1', "desk/0: cash"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_one_broken_rule_is_named_with_what_was_seen_and_where(name: str) -> None:
    edit, observed, shown = BREAKS[name]
    splits = toy()
    edit(splits)
    prepare(splits)
    with pytest.raises(DataError) as held:
        validate.main()
    found = result()
    assert found["success"] is False
    assert [n for n, e in found["expectations"].items() if not e["success"]] == [name]
    assert f"{name} (table {SUITE[name].table})" in held.value.what
    assert observed in held.value.what
    assert shown in held.value.what
    assert Path("data/validate/docs/index.html").exists()


def test_an_empty_frame_fails_even_if_nothing_counts_its_rows() -> None:
    prepare({**toy(), "train": []}, {"licence": SUITE["licence"]})
    with pytest.raises(DataError, match="train is empty"):
        validate.main()
    prepare(
        {**toy(), "test": []},
        {"licence": Expectation(expect="expect_column_values_to_be_in_set", table="test", kwargs={"column": "licence", "value_set": ["Apache-2.0"]})},
    )
    with pytest.raises(DataError, match="test is empty: nothing could be checked"):
        validate.main()
    assert result()["success"] is False


@pytest.mark.parametrize(
    ("expect", "kwargs", "message"),
    [
        ("expect_column_values_to_be_between", {"column": "tokenz", "max_value": 9}, 'The column "tokenz" in BatchData does not exist'),
        ("expect_column_values_to_match_regex", {"column": "text", "regex": "("}, "Great Expectations raised"),
        ("expect_column_value_to_be_between", {"column": "tokens"}, "did you mean expect_column_values_to_be_between?"),
        ("expect_column_values_to_be_between", {"column": "tokens", "maximum": 9}, r"bad\.kwargs\.maximum.*did you mean max_value\?"),
        ("expect_column_values_to_be_in_set", {"column": "label"}, r"validate\.expectations\.bad\.kwargs\.value_set: field required"),
        ("expect_column_values_to_be_between", {"column": "tokens"}, r"validate\.expectations\.bad\.kwargs: min_value and max_value cannot both be None"),
        ("expect_column_values_to_not_be_null", {"column": "text", "row_condition": "@pd.io.common.os.getcwd()"}, "a text is run as code"),
        (
            "expect_column_values_to_not_be_null",
            {"column": "text", "row_condition": {"type": "comparison", "column": {"name": "label"}, "operator": "==", "parameter": "nothing"}},
            "no row was looked at",
        ),
        ("expect_column_values_to_be_in_set", {"column": "group", "value_set": ["a"]}, "every value is missing"),
        ("expect_column_max_to_be_between", {"column": "meta.age", "max_value": 9}, "raised|no value to measure|does not hold"),
    ],
)
def test_what_cannot_be_checked_is_a_failure(expect: str, kwargs: dict[str, Any], message: str) -> None:
    prepare(toy(), {"bad": Expectation(expect=expect, kwargs=kwargs)})
    with pytest.raises(DataError, match=message):
        validate.main()
    assert result()["expectations"]["bad"]["success"] is False


def test_an_expectation_declared_twice_is_not_lost() -> None:
    prepare(toy(), {"one": SUITE["licence"], "two": SUITE["licence"]})
    with pytest.raises(DataError, match="another name declare the same"):
        validate.main()


def test_a_damaged_file_is_named_and_leaves_no_old_result() -> None:
    prepare(toy())
    validate.main()
    Path("data/preprocess/train.jsonl").write_text('{"id": "1", "sou', encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl:1: no JSON"):
        validate.main()
    assert not Path("data/validate/result.json").exists()
    splits = toy()
    splits["train"][1]["text"] = 5
    prepare(splits)
    with pytest.raises(DataError, match=r"train\.jsonl:2: text is 5, not text"):
        validate.main()
    splits["train"][1] |= {"text": "five", "messages": [{"role": "user"}]}
    prepare(splits)
    with pytest.raises(DataError, match=r"train\.jsonl:2: messages is no list"):
        validate.main()


def test_the_corpus_is_read_only_when_something_is_expected_of_it() -> None:
    corpus = [{**row(n, text, ""), "messages": [], "completion": ""} for n, text in enumerate(["Returns take ten days.", "call the order off"])]
    suite = {"c": Expectation(expect="expect_column_values_to_be_in_set", table="corpus", kwargs={"column": "overlap", "value_set": [0]})}
    prepare({**toy(), "corpus": corpus}, suite)
    with pytest.raises(DataError, match="desk/1: 1"):
        validate.main()
    assert result()["rows"]["corpus"] == 2


def test_docs_hold_no_time_path_or_foreign_image() -> None:
    prepare(toy(), {"raising": Expectation(expect="expect_column_values_to_match_regex", kwargs={"column": "text", "regex": "("})})
    with pytest.raises(DataError):
        validate.main()
    pages = "".join(page.read_text(encoding="utf-8") for page in Path("data/validate/docs").rglob("*.html"))
    assert "raised an exception" in pages
    for word in (str(Path.cwd()), str(ROOT), sys.prefix, "web-assets", "20261", "T11"):
        assert word not in pages


@pytest.mark.parametrize("name", ["support", "banking77"])
def test_shipped_suites_are_understood_by_great_expectations(name: str) -> None:
    declared = yaml.read(ROOT / f"conf/validate/{name}.yaml")["expectations"]
    assert [why for key, value in declared.items() if isinstance(why := build(key, Expectation(**value)), str)] == []
    assert all(value["why"] for value in declared.values())


def test_check_needs_no_stage(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"source": ["a"], "id": ["1"], "tokens": [3]})
    declared = {"few": Expectation(expect="expect_column_values_to_be_between", table="train", kwargs={"column": "tokens", "max_value": 2})}
    outcome = check({"train": frame}, declared, tmp_path / "docs", examples=1)["few"]
    assert outcome["examples"] == [{"source": "a", "id": "1", "value": 3}]


def test_small_functions() -> None:
    assert tables.tokens("Where's my order?") == 6
    assert tables.normal("Call  THE order—off!!") == tables.normal("call the order off") != tables.normal("call the order on")
    assert tables.normal("👍") != tables.normal("👎")
    assert tables.normal("a £1 charge") != tables.normal("a €1 charge")
    assert plain(float("nan")) == "nan"
    assert vacuous({"observed_value": float("nan")}) and not vacuous({"observed_value": 0.0})
    assert scrub("at 0x7f0000000000 in /opt/x/lib/python3.11/site-packages/a.py", {}) == "at 0x0 in site-packages/a.py"
    assert not harmless({"type": "pass_through", "pass_through_filter": "1"})
    assert not harmless({"type": "and", "conditions": ["@x", None]})
    assert not harmless({"type": "nullity", "column": {"name": "a`.b"}})


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_whatever_is_observed_becomes_json(value: object) -> None:
    json.dumps(plain(value), allow_nan=False)
