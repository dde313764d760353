"""The `trunkline` command: use, config, help, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.errors import ConfigError, DataError
from stages.operate.summary import costs, gather, one_line
from stages.operate.use import use
from tests.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def trunkline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder, with the code of that folder's conf/ and this repository's stages/."""
    code = "import sys; sys.path.insert(0, '.'); sys.argv[0] = 'trunkline'; from stages.operate.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=env)


def test_use_changes_one_line(small: Path) -> None:
    before = (small / "conf/config.yaml").read_text().splitlines()
    done = trunkline(small, "use", "adapter")
    assert done.returncode == 0, done.stderr
    assert "experiment: default → adapter" in done.stdout
    after = (small / "conf/config.yaml").read_text().splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [b.split("#")[0].strip() for _, b in changed] == ["- experiment: adapter"]
    assert after[before.index(changed[0][0])].endswith("# the selected one"), "the comment is gone"


def test_every_verb_speaks_json(small: Path) -> None:
    from typer.main import get_command

    from stages.operate.cli import app

    verbs = {name: [option for param in verb.params for option in param.opts] for name, verb in get_command(app).commands.items()}  # type: ignore[attr-defined]
    assert {name for name, options in verbs.items() if "--json" not in options} == {"repro", "merge-driver"}, "these are DVC's and git's"
    assert json.loads(trunkline(small, "use", "adapter", "--json").stdout)["told"].startswith("conf/config.yaml: experiment: default → adapter")


def test_use_twice_changes_nothing(small: Path) -> None:
    use("adapter", small / "conf")
    text = (small / "conf/config.yaml").read_bytes()
    assert "already" in use("adapter", small / "conf")
    assert (small / "conf/config.yaml").read_bytes() == text
    use("default", small / "conf")
    use("adapter", small / "conf")
    assert (small / "conf/config.yaml").read_bytes() == text


def test_use_keeps_a_long_name_apart_from_the_comment(small: Path) -> None:
    name = "a_name_longer_than_the_column_of_comments"
    (small / "conf/experiment" / f"{name}.yaml").write_text("# @package _global_\n")
    use(name, small / "conf")
    assert f"- experiment: {name}  # the selected one\n" in (small / "conf/config.yaml").read_text()


def test_use_refuses_an_unknown_experiment(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"no experiment 'adaptr'\n.*did you mean adapter\? conf/experiment/ has: adapter, default"):
        use("adaptr", small / "conf")
    done = trunkline(small, "use", "adaptr")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_config_shows_each_value_with_its_file(small: Path) -> None:
    done = trunkline(small, "config", "tune", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["tune.steps"] == {"value": 10, "file": "conf/tune/sft.yaml"}
    assert shown["tune.seed"] == {"value": 7, "file": "conf/experiment/default.yaml"}
    assert shown["tune.batch"] == {"value": 8, "file": "conf/schema.py"}
    assert all(key.startswith("tune.") for key in shown)


def test_config_piped_is_one_line_per_value(small: Path) -> None:
    lines = trunkline(small, "config").stdout.splitlines()
    assert "tune.steps\t10\tconf/tune/sft.yaml" in lines
    assert len(lines) > 100
    assert not any("\x1b" in line for line in lines)


def test_config_names_an_override(small: Path, python: Run) -> None:
    python("-m", "conf")
    params = small / "params.yaml"
    params.write_text(params.read_text().replace("seed: 7", "seed: 8"))
    shown = json.loads(trunkline(small, "config", "tune.seed", "--json").stdout)
    assert shown == {"tune.seed": {"value": 8, "file": "params.yaml (override)"}}


@pytest.mark.parametrize(("arguments", "part"), [(["config", "tuen"], "there is no key 'tuen'"), (["config"], "steps: input should be a valid integer")])
def test_config_tells_a_mistake(small: Path, arguments: list[str], part: str) -> None:
    if len(arguments) == 1:
        (small / "conf/tune/sft.yaml").write_text("steps: many\n")
    done = trunkline(small, *arguments)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    done = trunkline(tmp_path, "config")
    assert done.returncode == 2
    assert "holds no conf/config.yaml" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['trunkline', '--help']\ntry:\n  from stages.operate.cli import main; main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "hydra", "omegaconf", "pandas", "dvc", "transformers", "numpy", "bentoml"}


def test_summary_without_a_run_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no verdict yet"):
        gather()


def test_summary_refuses_the_verdict_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/gate").mkdir(parents=True)
    (tmp_path / "models/export/engine").mkdir(parents=True)
    (tmp_path / "models/gate/verdict.json").write_text('{"digest": "0", "promote": true}')
    with pytest.raises(DataError, match="of another model"):
        gather()


def test_costs_are_the_last_run_of_each_stage_in_pipeline_order(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    rows = [("tune", 3.0), ("collect", 1.0), ("tune", 2.0)]
    path.write_text("".join(json.dumps({"stage": s, "seconds": t, "peak_bytes": 1, "at": 0}) + "\n" for s, t in rows))
    assert [(c["stage"], c["seconds"]) for c in costs(path)] == [("collect", 1.0), ("tune", 2.0)]


def test_an_answer_is_shown_on_one_line() -> None:
    assert one_line("order_status\n\nSorry about the wait.\n") == "order_status / Sorry about the wait."
    assert one_line("\n\n \n") == "(only blanks)"


def test_a_locale_without_an_arrow_stops_no_command(small: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "stages.operate.cli", "use", "adapter"]
    done = subprocess.run(command, cwd=small, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"default ? adapter" in done.stdout
