"""Evaluate: the numbers that the gate reads, from the engine that serves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from conf.errors import ConfigError, DataError
from conf.schema import Task
from conf.yaml import dump
from stages import evaluate
from stages.files import read_json, read_jsonl, sha256
from stages.results import Result, Sample, average, sample_rows, slice_scores, value_of
from tests.models import tiny_llama

INTENTS = ["refund_status", "change_address", "cancel_order", "other"]


def result(*scores: float | None, **changes: Any) -> Result:
    samples = [
        Sample(doc_id=i, doc_hash=f"h{i}", prompt="p", target="t", answer="a", score=score, doc={"label": "xy"[i % 2], "meta": {"channel": None}})
        for i, score in enumerate(scores)
    ]
    known = [score for score in scores if score is not None]
    return Result(**{"score": sum(known) / max(len(known), 1), "stderr": 0.5, "n": len(scores), "reason": "", "samples": samples} | changes)


def test_a_task_is_the_mean_of_its_phrasings_and_their_spread() -> None:
    found = average({"a": result(1, 1, 1, 0), "b": result(1, 0, 0, 0)})
    assert (found["score"], found["spread"], found["n"]) == (0.5, 0.5, 4)
    rows = [1.0, 0.5, 0.5, 0.0]  # each row's mean: phrasings share their rows, so they are not eight independent ones
    assert found["stderr"] == pytest.approx(math.sqrt(sum((row - 0.5) ** 2 for row in rows) / 3 / 4))


def test_one_broken_phrasing_leaves_no_score() -> None:
    found = average({"a": result(1, 1), "b": result(score=None, stderr=None, reason="score is nan")})
    assert found["score"] is None and found["spread"] is None and found["reason"] == "b: score is nan"


def test_slices_count_rows_not_answers() -> None:
    rows = sample_rows({"a": result(1, 0, 1, 0), "b": result(1, 1, 1, 0)}, Task(phrasings=["a", "b"], metric="acc", slice_by="label"), "key")
    assert slice_scores(rows) == {"x": {"score": 1.0, "n": 2}, "y": {"score": 0.25, "n": 2}}
    assert [row["doc_hash"] for row in rows] == sorted(row["doc_hash"] for row in rows)


def test_a_slice_field_must_be_there() -> None:
    assert value_of({"meta": {"channel": None}}, "meta.channel", "k") == "" and value_of({"n": 0}, "n", "k") == "0"
    with pytest.raises(ConfigError, match=r"evaluate\.tasks\.t\.slice_by=meta\.chanel: a row has no such field"):
        value_of({"meta": {"channel": "web"}}, "meta.chanel", "evaluate.tasks.t.slice_by")


def test_rows_carry_what_they_are_sliced_and_grouped_by() -> None:
    task = Task(phrasings=["a"], metric="acc", slice_by="meta.channel", group_by="label")
    assert {(row["doc_hash"], row["slice"], row["group"]) for row in sample_rows({"a": result(1, 0, 1)}, task, "key")} == {
        ("h0", "(none)", "x"),
        ("h1", "(none)", "y"),
        ("h2", "(none)", "x"),
    }
    assert {row["group"] for row in sample_rows({"a": result(1, 0)}, Task(phrasings=["a"], metric="acc"), "key")} == {""}
    with pytest.raises(ConfigError, match=r"key\.group_by=customer: a row has no such field"):
        sample_rows({"a": result(1, 0)}, Task(phrasings=["a"], metric="acc", group_by="customer"), "key")


def test_a_broken_row_is_null_in_the_samples_and_in_its_slice() -> None:
    rows = sample_rows({"a": result(1.0, math.nan)}, Task(phrasings=["a"], metric="acc", slice_by="label"), "key")
    assert [row["score"] for row in rows] == [1.0, None] and slice_scores(rows)["y"] == {"score": None, "n": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_llama(tmp_path_factory.mktemp("tuned")), tiny_llama(tmp_path_factory.mktemp("base"), seed=1)


TASK = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data/preprocess/test.jsonl"}}, "test_split": "test", "doc_to_target": "label"}


def write_task(name: str, **changes: Any) -> None:
    path = Path("conf/evaluate/tasks") / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(TASK | {"task": name} | changes))


def write_params(tasks: dict[str, Any], engine: dict[str, Any] | None = None, **changes: Any) -> None:
    chosen = engine or {"kind": "transformers", "quantization": "float32", "threads": 1}
    Path("params.yaml").write_text(dump({"evaluate": {"tasks": tasks, "max_tokens": 4, "answers": 2} | changes, "serve": {"engine": chosen}}))


TASKS = {
    "intent": {"phrasings": ["plain", "polite"], "metric": "acc", "slice_by": "label", "system": "You are the Kestrel support desk."},
    "said": {"phrasings": ["said"], "metric": "exact_match", "general": True, "limit": 4},
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: tuple[Path, Path]) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for place, model in zip((evaluate.EXPORTED, evaluate.BASE), models, strict=True):
        place.parent.mkdir(parents=True)
        place.symlink_to(model)
    rows = [
        {
            "id": str(i),
            "source": "tickets",
            "licence": "MIT",
            "classification": "public",
            "text": f"my order number {i}",
            "label": INTENTS[i % 3],
            "completion": f"{INTENTS[i % 3]}\nThanks.",
            "messages": [{"role": "user", "content": f"my order number {i}"}, {"role": "assistant", "content": "x"}],
        }
        for i in range(12)
    ]
    Path("data/preprocess").mkdir(parents=True)
    evaluate.TEST.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {"output_type": "multiple_choice", "doc_to_choice": INTENTS, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    write_task("plain", doc_to_text="{{text}}", **choice)
    write_task("polite", doc_to_text="Please name the intent: {{text}}", **choice)
    write_task(
        "said",
        doc_to_text="{{text}}",
        output_type="generate_until",
        generation_kwargs={"until": ["\n"]},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    write_params(TASKS)
    return tmp_path


def test_the_stage_writes_what_the_gate_reads(desk: Path) -> None:
    evaluate.main()
    scores = read_json(evaluate.OUT / "scores.json")
    intent, said = scores["tasks"]["intent"], scores["tasks"]["said"]
    assert scores["digest"] == sha256(evaluate.EXPORTED)
    assert intent["n"] == 12 and said["n"] == 4 and said["general"] and not intent["general"]
    assert intent["base"]["phrasings"] == ["plain"] and intent["base"]["n"] == 12
    assert intent["gain"] == intent["phrasings"]["plain"]["score"] - intent["base"]["score"], "like with like: the base is asked one phrasing"
    assert set(intent["phrasings"]) == {"plain", "polite"} and set(intent["slices"]) == set(INTENTS[:3]) and said["slices"] == {}
    rows = list(read_jsonl(evaluate.OUT / "samples" / "intent.jsonl"))
    assert len(rows) == 24 and len({row["doc_hash"] for row in rows}) == 12
    assert sum(row["score"] for row in rows) / 24 == pytest.approx(intent["score"])
    assert {row["target"] for row in rows} == set(INTENTS[:3]) and all(row["answer"] in INTENTS for row in rows)
    answers = read_json(evaluate.OUT / "answers.json")
    assert len(answers) == 2 and set(answers[0]) == {"prompt", "base", "tuned", "target"} and answers[0]["target"] != answers[1]["target"]
    text = "".join(path.read_text() for path in sorted(evaluate.OUT.rglob("*.json*")))
    assert str(desk) not in text, "no path of this machine"
    first = sha256(evaluate.OUT)
    evaluate.main()
    assert sha256(evaluate.OUT) == first, "the same inputs give the same bytes"


def test_without_a_base_there_is_no_gain(desk: Path) -> None:
    write_params(TASKS, base=False, answers=1)
    evaluate.main()
    assert "gain" not in read_json(evaluate.OUT / "scores.json")["tasks"]["intent"]
    assert read_json(evaluate.OUT / "answers.json")[0]["base"] is None


def test_a_missing_model_or_no_test_row_stops(desk: Path) -> None:
    evaluate.TEST.write_text("")
    with pytest.raises(DataError, match="has no row"):
        evaluate.main()
    evaluate.EXPORTED.unlink()
    with pytest.raises(DataError, match="models/export/engine is missing"):
        evaluate.main()
    assert not evaluate.OUT.exists()


def test_the_base_is_converted_once_for_the_serving_engine(desk: Path, models: tuple[Path, Path]) -> None:
    convert = pytest.importorskip("stages.convert")
    engine = {"kind": "ctranslate2", "quantization": "int8", "threads": 1}
    evaluate.EXPORTED.unlink()
    convert.to_ctranslate2(models[0], evaluate.EXPORTED, "int8")
    write_params(TASKS, engine)
    evaluate.main()
    scratch = list((desk / ".dvc/tmp/trunkline/evaluate").iterdir())
    stamp, first = (scratch[0] / "model.bin").stat().st_mtime_ns, sha256(evaluate.OUT)
    evaluate.main()
    assert len(scratch) == 1 and (scratch[0] / "model.bin").stat().st_mtime_ns == stamp and sha256(evaluate.OUT) == first
