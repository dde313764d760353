"""dvc.yaml against the code: same names, same order, and `deps`, `params` and `outs` that say what a stage really uses."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.closure import closure
from stages.package import SERVICE
from tests.conftest import ROOT

PIPELINE: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = [name for name in PIPELINE if name != "compose"]


def has_code(file: Path) -> bool:
    """Whether there is more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(file.read_text(encoding="utf-8")).body)


def code(stage: str) -> set[str]:
    """The files a stage must depend on: its imports in stages/ (conf/ reaches it by value, through `params`); and package
    what it puts into the Bento, conf/ included."""
    files = {file for file in closure(f"stages.{stage}", root=ROOT) if file.parts[0] == "stages"}
    if stage == "package":
        files |= set(closure(SERVICE, root=ROOT))
    return {file.as_posix() for file in files if has_code(ROOT / file)}


def names(entries: list[Any]) -> list[str]:
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def test_one_stage_per_module_in_the_order_of_the_design() -> None:
    assert STAGES == ["collect", "preprocess", "validate", "select", "tune", "export", "evaluate", "guard", "redteam", "gate", "package"]
    for stage in STAGES:
        assert PIPELINE[stage]["cmd"] == f"python -m stages.{stage}"
    assert "${" not in (ROOT / "dvc.yaml").read_text(), "a template is resolved at load, one run stale"


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage: str) -> None:
    declared = {dep for dep in PIPELINE[stage]["deps"] if dep.endswith(".py")}
    assert declared == code(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_keys_that_the_stage_loads(stage: str) -> None:
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in code(stage) if file.startswith("stages/"))
    loaded = set(re.findall(r"""\bconf\.load\(\s*["']([\w.]+)["']""", text))
    assert stage in loaded
    # package names the digest of the whole file in the provenance
    assert PIPELINE[stage]["params"] == ([{"params.yaml": None}] if stage == "package" else sorted(loaded))


@pytest.mark.parametrize("stage", STAGES)
def test_outs_are_below_the_stages_own_folder(stage: str) -> None:
    outs = names(PIPELINE[stage].get("outs", []) + PIPELINE[stage].get("metrics", []))
    assert outs
    assert all(out.startswith((f"data/{stage}", f"models/{stage}")) for out in outs)


@pytest.mark.parametrize("stage", STAGES)
def test_every_data_dependency_is_made_by_an_earlier_stage_or_in_git(stage: str) -> None:
    earlier = [out for name in STAGES[: STAGES.index(stage)] for out in names(PIPELINE[name].get("outs", []) + PIPELINE[name].get("metrics", []))]
    for dep in PIPELINE[stage]["deps"]:
        if not dep.endswith(".py") and dep not in {"data/raw", "conf/evaluate/tasks", "requirements.txt"}:
            assert any(dep == out or dep.startswith(f"{out}/") for out in earlier), dep


def test_no_stage_needs_a_folder_of_which_an_earlier_one_needs_a_part() -> None:
    """`dvc repro --pull --allow-missing` fetches a dependency that is not there; a folder that holds a part already is there for it."""
    parts: set[str] = set()
    for stage in STAGES:
        for dep in PIPELINE[stage]["deps"]:
            assert not [part for part in parts if part.startswith(f"{dep}/")], f"{stage} needs {dep}: name the files or folders in it"
        parts |= {dep for dep in PIPELINE[stage]["deps"] if not dep.endswith(".py")}


def test_one_name_in_six_places() -> None:
    from conf.schema import Config

    fields = set(Config.__dataclass_fields__)
    for stage in STAGES:
        assert stage in fields
        assert (ROOT / "conf" / stage).is_dir()
        assert (ROOT / "tests" / f"test_{stage}.py").exists(), stage
