"""What numbers depend on: described without a host's name, found in git and in DVC's cache, compared, said, and no business of the gate."""

from __future__ import annotations

import json
import os
import platform as standard
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import conf.schema
from stages import gate, platform
from stages.files import read_json, write_json
from tests.bento import package, packaged
from tests.checkout import commit, sh
from tests.conftest import ROOT

NEW = {"system": "Linux x86_64 glibc 2.36", "instructions": "avx2 avx512f", "torch": "2.13.0+cpu", "torch kernels": "AVX512"}
OLD = NEW | {"instructions": "avx2", "torch kernels": "AVX2"}


def described(*libraries: str, **environment: str) -> platform.Platform:
    """`describe` in a process of its own that has loaded the libraries."""
    code = f"import json, {', '.join(libraries)}\nfrom stages import platform\nprint(json.dumps(platform.describe(*{libraries!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_it_names_builds_and_instructions_and_no_host() -> None:
    found = described("torch", "ctranslate2", "numpy")
    assert found["torch"] == version("torch")
    assert found["ctranslate2 types"].split()
    assert found["torch kernels"] and found["numpy instructions"]
    assert standard.machine() in found["system"]
    assert standard.node() not in json.dumps(found).split() and str(Path.cwd()) not in json.dumps(found)
    assert found == described("torch", "ctranslate2", "numpy")


@pytest.mark.skipif(standard.machine() != "x86_64", reason="torch has one set of kernels here")
def test_other_kernels_of_the_same_build_are_seen() -> None:
    usual, limited = described("torch"), described("torch", ATEN_CPU_CAPABILITY="default")
    assert limited["torch kernels"] != usual["torch kernels"]
    assert {d.partition(":")[0] for d in platform.differences(limited, usual)} == {"torch kernels", "ATEN_CPU_CAPABILITY"}


def test_a_library_that_is_not_loaded_costs_no_import() -> None:
    code = "import sys\nfrom stages import platform\nplatform.describe('torch', 'ctranslate2', 'numpy')\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ctranslate2", "numpy"} & set(loaded)


def test_only_what_both_know_is_compared() -> None:
    assert platform.differences(NEW, OLD) == ["instructions: avx2 avx512f here, avx2 there", "torch kernels: AVX512 here, AVX2 there"]
    assert platform.differences(NEW, {"ctranslate2": "4.8.5", "system": NEW["system"]}) == []
    assert platform.differences({"torch": "2"}, {"torch": "2", "MKL_CBWR": "AVX2"}) == ["MKL_CBWR: not set here, AVX2 there"]
    assert platform.differences({"numpy": "2"}, {"torch": "2", "MKL_CBWR": "AVX2"}) == []  # numpy does not compute with it
    assert platform.mixed({"select": OLD, "tune": NEW, "export": NEW})[0] == "instructions: avx2 avx512f in tune, avx2 in select"
    assert [stages for stages, _ in platform.grouped({"select": OLD, "tune": NEW, "export": NEW})] == [["select"], ["tune", "export"]]


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose HEAD has a record in git (evaluate) and one in an output of DVC (tune), both of the old platform; neither is in the tree."""
    for name in ("tune", "evaluate"):
        write_json(tmp_path / "kept" / f"{name}.json", {"platform": OLD})
    out = {"models/evaluate/scores.json": {"cache": False}}
    copy = "mkdir -p models/tune models/evaluate && cp kept/tune.json models/tune/summary.json && cp kept/evaluate.json models/evaluate/scores.json"
    write_json(tmp_path / "dvc.yaml", {"stages": {"tune": {"cmd": copy, "outs": ["models/tune"], "metrics": [out]}}})
    for command in (("git", "init", "-q"), ("git", "config", "user.email", "t@example.org"), ("git", "config", "user.name", "T"), ("dvc", "init", "-q")):
        sh(tmp_path, *command)
    sh(tmp_path, "dvc", "repro")
    commit(tmp_path, "Run it on the old platform")
    shutil.rmtree(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stage_says_that_head_was_made_elsewhere(history: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(platform, "describe", lambda *_: NEW)
    for stage in ("tune", "evaluate"):
        caplog.clear()
        assert platform.record(stage, (), "torch") == NEW
        assert len(caplog.records) == 1
        assert f"HEAD's {platform.RECORDS[stage]} was made on another platform" in caplog.text
        assert "torch kernels: AVX512 here, AVX2 there" in caplog.text


def test_a_stage_says_that_its_input_was_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platform, "describe", lambda *_: NEW)
    write_json(platform.RECORDS["select"], {"platform": OLD})
    platform.record("tune", ("select",), "torch")
    assert "models/select/leaderboard.json, an input, was made on another platform" in caplog.text


def test_nothing_is_said_where_nothing_differs_or_is_known(history: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(platform, "describe", lambda *_: OLD)
    platform.record("tune", ("select",), "torch")
    platform.record("evaluate", ("select", "export"), "torch")
    monkeypatch.setattr(platform, "describe", lambda *_: NEW)
    shutil.rmtree(history / ".dvc/cache")
    platform.record("tune", ("select",), "torch")
    assert caplog.text == ""


def test_the_gate_does_not_look_at_it() -> None:
    rules = {"right": conf.schema.Absolute(metric="evaluate.intent", direction="at_least", limit=0.5)}
    score = {"tasks": {"intent": {"score": 0.9, "n": 10}}, "digest": "a"}
    verdicts = []
    for made_on in (OLD, NEW):
        found = {"evaluate": {**score, "platform": made_on}, "redteam": {"digest": "a", "platform": NEW}, "export": {"digest": "a", "platform": NEW}}
        verdicts.append(gate.decide(conf.schema.Gate(absolute=rules), found, [], None))
    assert verdicts[0] == verdicts[1]
    assert verdicts[0]["outcome"] == "promote"


def test_the_provenance_names_the_platforms_and_a_mix_is_said(tmp_path: Path) -> None:
    folder = shutil.copytree(packaged(), tmp_path / "repository")
    assert "different platforms" not in package(folder).stderr
    for stage, path in platform.RECORDS.items():
        write_json(folder / path, read_json(folder / path) | {"platform": OLD if stage == "select" else NEW})
    done = package(folder)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "ran on different platforms" in said and "torch kernels: AVX512 in tune, AVX2 in select" in said
    src = folder / "models/package/src"
    assert read_json(src / "provenance.json")["platforms"] == {stage: OLD if stage == "select" else NEW for stage in platform.RECORDS}
    card = (src / "MODEL_CARD.md").read_text()
    assert "select: instructions avx2; " in card and "tune, export, evaluate, guard, redteam: instructions avx2 avx512f; " in card


def test_the_summary_says_where_it_was_made(tmp_path: Path) -> None:
    folder = shutil.copytree(packaged(), tmp_path / "repository")
    (folder / "conf/config.yaml").touch()
    write_json(folder / "models/evaluate/answers.json", [])
    here = platform.describe()
    for path in platform.RECORDS.values():
        write_json(folder / path, read_json(folder / path) | {"platform": here})
    command = (sys.executable, "-m", "stages.operate.cli", "summary")
    shown = " ".join(sh(folder, *command).stdout.split())
    assert f"Made on (select, tune, export, evaluate, guard, redteam): instructions {here['instructions']}" in shown
    assert "another platform" not in shown
    tuned = folder / platform.RECORDS["tune"]
    write_json(tuned, read_json(tuned) | {"platform": here | {"instructions": "avx2"}})
    shown = " ".join(sh(folder, *command).stdout.split())
    assert f"Made on another platform than this one (tune: instructions: {here['instructions']} here, avx2 there)" in shown
    assert json.loads(sh(folder, *command, "--json").stdout)["elsewhere"] == [f"tune: instructions: {here['instructions']} here, avx2 there"]
