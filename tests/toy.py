"""A repository with five stages that take no time: what the verbs on a pipeline are tried on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PIPELINE = """
stages:
  a: {cmd: "python step.py a", deps: [raw.txt, step.py], params: [a], outs: [out/a]}
  b: {cmd: "python step.py b", deps: [out/a/x, code_b.txt], params: [b], outs: [out/b]}
  c: {cmd: "python step.py c", deps: [out/a, code_c.txt], params: [c], outs: [out/c], metrics: [{out/m.json: {cache: false}}]}
  d: {cmd: "python step.py d", deps: [out/b/x, out/c], params: [d], outs: [out/d]}
  e: {cmd: "python step.py e", deps: [out/d, out/m.json], params: [{params.yaml: null}], outs: [out/e]}
"""
STEP = """
import os, pathlib, sys
name = sys.argv[1]
with open(os.environ["RAN"], "a") as log:
    log.write(name + "\\n")
values = dict(line.split(": ") for line in open("params.yaml").read().splitlines())
inputs = {"a": ["raw.txt"], "b": ["out/a/x", "code_b.txt"], "c": ["out/a/y", "code_c.txt"], "d": ["out/b/x", "out/c/x"], "e": ["out/d/x", "out/m.json"]}[name]
text = "".join(open(path).read().split("\\n")[0] for path in inputs) + str(int(values[name]) // 2)  # second lines and odd values change nothing
out = pathlib.Path("out", name)
out.mkdir(parents=True)
(out / "x").write_text(text)
(out / "y").write_text(text[::-1])
if name == "c":
    pathlib.Path("out/m.json").write_text(str(len(text)))
"""


class Toy:
    """A repository with five stages whose commands note that they ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log = folder, folder.parent / "ran"
        folder.mkdir()
        (folder / "dvc.yaml").write_text(PIPELINE)
        (folder / "step.py").write_text(STEP)
        for name in ("raw", "code_b", "code_c"):
            (folder / f"{name}.txt").write_text(f"{name}\nsecond\n")
        self.set({name: 4 for name in "abcde"})
        monkeypatch.chdir(folder)
        monkeypatch.setenv("RAN", str(self.log))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        self.git("init", "-q", "-b", "main")
        self.git("config", "user.email", "test@example.org")
        self.git("config", "user.name", "Test")
        self.dvc("init", "-q")

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def dvc(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)

    def commit(self, message: str) -> str:
        """Run the pipeline and commit everything."""
        self.repro()
        self.git("add", "-A")
        self.git("commit", "-qm", message)
        return self.git("rev-parse", "HEAD")

    def set(self, values: dict[str, int]) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(values))

    @property
    def values(self) -> dict[str, int]:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def repro(self) -> set[str]:
        from dvc.repo import Repo

        self.log.write_text("")
        with Repo(".") as repo:
            repo.reproduce()
        return set(self.log.read_text().split())

    def mutate(self, choose: random.Random) -> str:
        """Change a value, a file, its second line, an output, or the cache."""
        kind = choose.choice(["value", "value", "code", "second line", "output", "cache"])
        text = self.folder / f"{choose.choice(['raw', 'code_b', 'code_c'])}.txt"
        match kind:
            case "value":
                self.set({**self.values, choose.choice("abcde"): choose.randrange(4, 8)})
            case "code":
                text.write_text(f"{text.stem}{choose.randrange(3)}\nsecond\n")
            case "second line":
                text.write_text(text.read_text().split("\n")[0] + f"\n{choose.randrange(3)}\n")
            case "output":
                shutil.rmtree(self.folder / "out" / choose.choice("abcde"), ignore_errors=True)
            case "cache" if choose.random() < 0.4:
                choose.choice(sorted(p for p in (self.folder / ".dvc/cache/files").rglob("*") if p.is_file())).unlink()
        return kind
