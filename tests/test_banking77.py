"""BANKING77 through the mirror by the real `dvc repro`: the data whole, and a model of a few steps as far as its verdict."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.files import read_json, read_jsonl
from tests.checkout import EVERYTHING, change, ran, sh, working_tree
from tests.conftest import ROOT

DIGESTS = ("b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b", "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d")
MIRROR = Path(os.environ.get("TRUNKLINE_MIRROR", ROOT.parent / "shared" / "mirror"))
QUESTIONS = 200
"""Rows of the official test set that the reduced run asks."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all((MIRROR / digest).is_file() for digest in DIGESTS), reason="no mirror with BANKING77: set TRUNKLINE_MIRROR"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with `banking77_made` run up to validate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_MIRROR", str(MIRROR))
        folder = working_tree(tmp_path_factory.mktemp("banking77") / "trunkline", "banking77_made")
        sh(folder, "git", "add", "-A")
        sh(folder, "git", "commit", "-qm", "Use banking77_made")
        assert ran(sh(folder, "dvc", "repro", "validate")) == EVERYTHING[:4]
    return folder


def test_the_data_of_banking77_comes_from_the_mirror_and_is_sound(tree: Path) -> None:
    manifest = read_json(tree / "data/collect/manifest.json")
    assert [manifest[name]["rows"] for name in ("banking77-train", "banking77-test")] == [10_003, 3_080]
    assert [manifest[name]["sha256"] for name in ("banking77-train", "banking77-test")] == list(DIGESTS)
    summary = read_json(tree / "data/preprocess/summary.json")
    assert summary["rows"]["test"] == 3_080, "the official test set is kept whole"
    assert 8_500 < summary["rows"]["train"] < 9_500
    assert summary["reasons"]["contaminated:test"] > 0 or summary["reasons"]["duplicate:exact"] > 0
    assert read_json(tree / "data/validate/result.json")["success"] is True


def test_a_few_steps_reach_the_verdict_and_are_held(tree: Path) -> None:
    file = tree / "conf/experiment/banking77_made.yaml"
    change(file, "select:\n", "select:\n  candidates: {made_4m: {steps: 4}}\n  probe: {limit: 2}\n")
    change(file, "  epochs: 1.0\n", "  epochs: null\n  steps: 8\n")
    asked = f"evaluate:\n  tasks: {{banking77_intent: {{limit: {QUESTIONS}}}, piqa: {{limit: 20}}}}\nredteam: {{per_source: 4}}\n"
    file.write_text(file.read_text(encoding="utf-8") + asked, encoding="utf-8")
    done = sh(tree, "dvc", "repro", check=False)
    assert done.returncode != 0
    assert ran(done) == ["compose", *EVERYTHING[4:-1]], done.stderr
    assert "gate stopped" in done.stderr
    tuned = read_json(tree / "models/tune/summary.json")
    assert (tuned["steps"], tuned["rows"]) == (8, read_json(tree / "data/preprocess/summary.json")["rows"]["train"])
    score = read_json(tree / "models/evaluate/scores.json")["tasks"]["banking77_intent"]
    assert score["n"] == QUESTIONS
    official = {row["label"] for row in read_jsonl(tree / "data/preprocess/test.jsonl")}
    samples = list(read_jsonl(tree / "models/evaluate/samples/banking77_intent.jsonl"))
    assert len(official) == 77 and len({row["doc_id"] for row in samples}) == QUESTIONS and {row["target"] for row in samples} <= official
    verdict = read_json(tree / "models/gate/verdict.json")
    assert (verdict["outcome"], verdict["promote"]) == ("hold", False)
    assert any("evaluate.banking77_intent" in reason for reason in verdict["reasons"])
    assert {rule["metric"] for rule in verdict["rules"]} >= {"export.agreement", "redteam.attack_success", "evaluate.banking77_intent.gain"}
    assert not (tree / "models/package").exists()
