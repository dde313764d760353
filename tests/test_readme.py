"""The README names only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from conf.compose import choices
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_its_first_command_comes_early() -> None:
    lines = TEXT.splitlines()
    assert len(lines) < 200
    assert next(i for i, line in enumerate(lines) if line.startswith("make ")) < 25
    assert next(i for i, line in enumerate(lines) if line.startswith("conf/  ")) < 90


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_path_of_the_tree_exists() -> None:
    block = re.search(r"## The tree\n\n```\n(.*?)```", TEXT, re.S)
    assert block
    parent = Path()
    for line in block[1].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            path = parent / name
        else:
            path = parent = Path(name)
        if "<" not in name:
            assert (ROOT / path).exists(), path


def test_the_table_lists_the_experiments() -> None:
    rows = [re.findall(r"`([a-z0-9_]+)`", line.split("|")[1]) for line in TEXT.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in row) == choices()["experiment"]


@pytest.mark.parametrize("key", re.findall(r"^trunkline config ([\w.]+)", TEXT, re.M))
def test_every_key_it_shows_exists(key: str) -> None:
    from conf.compose import compose

    values: object = compose().values
    for part in key.split("."):
        assert isinstance(values, dict)
        values = values[part]


def test_the_model_it_asks_is_the_default_one() -> None:
    from conf.compose import compose

    assert f'model="{compose(["experiment=default"]).config.package.name}"' in TEXT


def test_the_pipeline_it_draws_is_the_one_of_dvc_yaml() -> None:
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]:
        assert re.search(rf"\b{stage}\b", TEXT), stage
