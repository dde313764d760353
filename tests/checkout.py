"""Whole repositories for the slow tests: this working tree in a folder of its own, `tiny` cut down to a minute, and what ran in it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.conftest import ROOT

if TYPE_CHECKING:
    from openai import OpenAI

EVERYTHING = ["compose", "collect", "preprocess", "validate", "select", "tune", "export", "evaluate", "guard", "redteam", "gate", "package"]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This process's environment, with this Python's programs on PATH and the code of `folder`."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), **more}


def sh(folder: Path, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, in `environment(folder)` unless another one is given."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, env=env or environment(folder))
    assert not check or done.returncode == 0, f"{' '.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that `dvc repro` executed."""
    return re.findall(r"Running stage '(\w+)'", done.stdout)


def change(file: Path, old: str, new: str) -> None:
    """Replace the first `old` in a file."""
    text = file.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {file}"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def commit(folder: Path, message: str) -> None:
    """Commit everything."""
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "commit", "-qm", message)


def working_tree(folder: Path, experiment: str) -> Path:
    """Make this working tree a repository of its own in `folder`, with an experiment selected and nothing run."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and name not in {"dvc.lock", "params.yaml"}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    sh(folder, "git", "init", "-q", "-b", "main")
    sh(folder, "git", "config", "user.email", "test@example.org")
    sh(folder, "git", "config", "user.name", "Test")
    sh(folder, sys.executable, "-m", "stages.operate.cli", "use", experiment)
    return folder


def merge(folder: Path, experiment: str, values: Mapping[str, Any]) -> None:
    """Set values in an experiment's file, as a reviewer would find them there."""
    file = folder / f"conf/experiment/{experiment}.yaml"
    text = file.read_text(encoding="utf-8")

    def into(old: dict[str, Any], new: Mapping[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, Mapping) and isinstance(old.get(key), dict):
                into(old[key], value)
            else:
                old[key] = value

    whole = yaml.safe_load(text) or {}
    into(whole, values)
    file.write_text("# @package _global_\n" + yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")


def cut_down_tiny(folder: Path, *, steps: int = 12, checkpoint_every: int = 6) -> None:
    """Make `tiny` a run of a minute: few steps, few questions, and a gate that lets through whatever comes of it."""
    pretrained = {"kestrel_mini": {"steps": 10}}
    rules = {
        "intent": {"limit": 0.0},
        "intent-gain": {"limit": -1.0},
        "intent-spread": {"limit": 1.0},
        "false-alarms": {"limit": 1.0},
        "export": {"limit": 0.0},
    }
    merge(folder, "tiny", {
        "select": {"candidates": pretrained, "probe": {"limit": 6}},
        "tune": {"steps": steps, "epochs": None, "evaluate_every": max(steps // 2, 1), "checkpoint_every": checkpoint_every},
        "export": {"probes": 4, "min_agreement": 0.0, "max_logit_difference": 100.0},
        "evaluate": {"tasks": {"support_intent": {"limit": 12}, "piqa": {"limit": 4}}},
        "redteam": {"per_source": 2, "benign_limit": 20},
        "gate": {"absolute": rules},
    })  # fmt: skip


def first_difference(one: Path, other: Path) -> str:
    """The first stage whose outputs differ between two checkouts, and the first file in them; empty where no lock differs."""
    if (one / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes():
        return ""
    locks = [yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"] for folder in (one, other)]
    for stage in EVERYTHING:
        outs = [{out["path"]: out for out in lock.get(stage, {}).get("outs", [])} for lock in locks]
        for path in sorted(outs[0].keys() | outs[1].keys()):
            if outs[0].get(path) != outs[1].get(path):
                return f"{stage}: {path}: {_first_file(one / path, other / path) or (outs[0].get(path), outs[1].get(path))}"
    return "the outputs are the same, and dvc.lock is not"


def _first_file(one: Path, other: Path) -> str:
    names = sorted({file.relative_to(folder).as_posix() for folder in (one, other) for file in folder.rglob("*") if file.is_file()}) or [""]
    for name in names:
        both = [folder / name for folder in (one, other)]
        if not all(file.is_file() for file in both):
            return f"{name} is in one of them only"
        if both[0].read_bytes() != both[1].read_bytes():
            return f"{name} differs"
    return ""


@contextmanager
def served(bento: Path, timeout: float = 120) -> Iterator[OpenAI]:
    """`bentoml serve` of a Bento's folder, from outside of its repository; gives a client once it answers."""
    from openai import APIConnectionError, OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {key: value for key, value in environment(bento, BENTOML_DO_NOT_TRACK="1").items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "bentoml", "serve", str(bento), "--port", str(port)]
    server = subprocess.Popen(command, cwd=bento.anchor, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(int(2 * timeout)):
            assert server.poll() is None, server.stderr.read().decode() if server.stderr else ""
            try:
                client.models.list()
                break
            except APIConnectionError:  # not up yet
                time.sleep(0.5)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def ask(bento: Path, *questions: str) -> list[tuple[str, str]]:
    """Digest (its beginning) and answer of the served model, for each question."""
    with served(bento) as client:
        model = client.models.list().data[0].id
        answers = [client.chat.completions.create(model=model, temperature=0, messages=[{"role": "user", "content": question}]) for question in questions]
    return [(str(answer.system_fingerprint).removeprefix("fp_").removeprefix("sha256:"), str(answer.choices[0].message.content)) for answer in answers]
