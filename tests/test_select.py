"""select: limits and policy come before any fetch, the probe decides among the rest, and the leaderboard says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import DigestMismatch, ModelError
from conf.schema import Access, Architecture, Candidate, FilesSource, HubSource, Limits, Made, Pretrained, Probe, Select
from conf.yaml import dump
from stages import select
from stages.select import OUT, TUNING, Row, breaches, choose, describe, refuse

OPEN = Access(classifications=["public", "internal"], licences=["Apache-2.0", "LicenseRef-Made"])
POLICY = {"training": OPEN, "serving": OPEN, "evaluation": OPEN}
TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: data/rows.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{ text }}"
doc_to_choice: [yes_please, no_thanks]
doc_to_target: "{{ label }}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def hub(**changes: object) -> Pretrained:
    """A candidate of the hub that no test could fetch."""
    origin = HubSource(
        kind="hub",
        repo="nobody/nothing",
        repo_type="model",
        revision="0" * 40,
        licence=str(changes.get("licence", "Apache-2.0")),
        classification=changes.get("classification", "public"),
    )
    parameters, size = int(str(changes.get("parameters", 1000))), int(str(changes.get("bytes", 4000)))
    return Pretrained(kind="pretrained", format="safetensors", parameters=parameters, bytes=size, origin=origin)


def made(hidden: int = 32, steps: int = 2) -> Made:
    """A candidate made here, in a second."""
    return Made(
        kind="made",
        licence="LicenseRef-Made",
        steps=steps,
        batch=2,
        sequence=16,
        architecture=Architecture(vocab=300, hidden=hidden, layers=1, heads=2, kv_heads=1, intermediate=32, context=128),
    )


def chosen_of(candidates: dict[str, Candidate], limits: Limits | None = None, **changes: object) -> Select:
    """Settings with these candidates."""
    return Select(
        candidates=candidates,
        limits=limits or Limits(licences=["*"]),
        policy=POLICY,
        probe=Probe(task="toy_choice", limit=8),
        dtype="float32",
        threads=1,
        **changes,
    )


def write(settings: Select, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of nothing but what select reads."""
    from dataclasses import asdict

    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(dump({"select": json.loads(json.dumps(asdict(settings)))}))
    rows = [
        {
            "id": str(i),
            "source": "toy",
            "licence": "Apache-2.0",
            "classification": "public",
            "text": f"Do you want {i} tents?",
            "label": ("yes_please", "no_thanks")[i % 2],
        }
        for i in range(10)
    ]
    for path in ("data/rows.jsonl", "data/preprocess/corpus.jsonl", "data/preprocess/train.jsonl"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("conf/evaluate/tasks").mkdir(parents=True)
    Path("conf/evaluate/tasks/toy_choice.yaml").write_text(TASK)


@pytest.mark.parametrize(
    ("candidate", "limits", "reason"),
    [
        (
            hub(licence="GPL-3.0-only"),
            Limits(licences=["Apache-2.0", "CC-BY-*"]),
            "licence GPL-3.0-only is not among select.limits.licences (Apache-2.0, CC-BY-*)",
        ),
        (hub(parameters=1001), Limits(licences=["*"], max_parameters=1000), "parameters 1,001 is over select.limits.max_parameters=1,000"),
        (hub(bytes=4001), Limits(licences=["*"], max_bytes=4000), "bytes 4,001 is over select.limits.max_bytes=4,000"),
        (hub(parameters=1000), Limits(licences=["*"], max_memory=15_999), "memory 16,000 is over select.limits.max_memory=15,999"),
        (made(), Limits(licences=["*"], max_parameters=1000), "parameters 15,840 is over select.limits.max_parameters=1,000"),
    ],
)
def test_each_limit_refuses_alone(candidate: Candidate, limits: Limits, reason: str) -> None:
    assert breaches(describe("it", candidate), limits) == [reason]


def test_a_candidate_at_its_limits_passes() -> None:
    limits = Limits(licences=["Apache-*"], max_parameters=1000, max_bytes=4000, max_memory=1000 * TUNING)
    assert breaches(describe("it", hub()), limits) == []


def test_the_policy_refuses_a_classification_for_training_and_serving() -> None:
    settings = chosen_of({"secret": hub(classification="restricted")})
    row = describe("secret", settings.candidates["secret"])
    refuse(settings, row)
    assert row.outcome == "refused"
    assert len(row.reasons) == 2 and all("restricted" in reason for reason in row.reasons)
    assert "training" in row.reasons[0] and "serving" in row.reasons[1]


def test_a_hopeless_list_stops_before_any_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(chosen_of({"large": hub(parameters=10**9)}, Limits(licences=["*"], max_parameters=10)), tmp_path, monkeypatch)
    with pytest.raises(ModelError, match="no candidate is left: large: parameters 1,000,000,000 is over"):
        select.main()
    assert not OUT.exists() and not Path(".dvc").exists()


def test_a_refused_preference_stops() -> None:
    rows = [
        Row(candidate="a", licence="MIT", parameters=1, bytes=0, score=0.5),
        Row(candidate="b", licence="X", parameters=1, bytes=0, outcome="refused", reasons=["why"]),
    ]
    with pytest.raises(ModelError, match="prefer=b is refused: b: why"):
        choose(rows, "b")


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(1, 3), st.booleans()), min_size=1, max_size=6), st.randoms())
def test_the_choice_is_the_best_allowed_one_in_any_order(found: list[tuple[float, int, bool]], random: object) -> None:
    rows = [
        Row(candidate=f"c{i}", licence="MIT", parameters=size, bytes=0, score=score, outcome="passed" if ok else "refused")
        for i, (score, size, ok) in enumerate(found)
    ]
    left = [row for row in rows if row.outcome == "passed"]
    if not left:
        with pytest.raises(ModelError):
            choose(rows, None)
        return
    best, why = choose(rows, None)
    assert best.score == max(row.score for row in left)
    assert best.parameters == min(row.parameters for row in left if row.score == best.score)
    assert best.candidate in why
    assert choose(rows[::-1], None) == (best, why)


def test_the_leaderboard_tells_all_and_the_base_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates: dict[str, Candidate] = {"wide": made(hidden=48), "small": made(), "large": hub(parameters=10**9)}
    write(chosen_of(candidates, Limits(licences=["*"], max_parameters=10**6), prefer="wide"), tmp_path, monkeypatch)
    select.main()
    board = json.loads((OUT / "leaderboard.json").read_text())
    assert board["chosen"] == "wide" and "select.prefer names it" in board["why"]
    outcomes = {row["candidate"]: row["outcome"] for row in board["candidates"]}
    assert outcomes == {"wide": "chosen", "small": "passed", "large": "refused"}
    assert all(0 <= row["score"] <= 1 for row in board["candidates"] if row["outcome"] != "refused")
    assert board["candidates"][-1]["score"] is None and "max_parameters" in board["candidates"][-1]["reasons"][0]
    assert {file.name for file in (OUT / "base").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not (Path(".dvc/tmp/trunkline/select")).exists()
    first = (OUT / "leaderboard.json").read_bytes()
    select.main()
    assert (OUT / "leaderboard.json").read_bytes() == first


def test_a_wrong_digest_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = FilesSource(kind="files", path="data/rows.jsonl", sha256="0" * 64, licence="Apache-2.0", classification="public")
    wrong = Pretrained(kind="pretrained", format="gguf", parameters=1000, bytes=10**6, origin=origin)
    write(chosen_of({"wrong": wrong}), tmp_path, monkeypatch)
    with pytest.raises(DigestMismatch, match="0" * 64):
        select.main()
    assert not OUT.exists()
