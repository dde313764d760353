"""What several test files share: a small, whole conf/ and the places of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from stages.serve.engine_transformers import TransformersEngine

# the machines are shared: how long an example takes says nothing
settings.register_profile("trunkline", deadline=None)
settings.load_profile("trunkline")

ROOT = Path(__file__).parent.parent
DIGEST = "0" * 64

SMALL = {
    "config.yaml": """
defaults:
  - collect: toy
  - validate: toy
  - select: toy
  - tune: sft
  - evaluate: toy
  - guard: toy
  - redteam: toy
  - gate: toy
  - package: toy
  - experiment: default   # the selected one
  - _self_
""",
    "collect/toy.yaml": f"""
datasets:
  rows: {{origin: {{kind: files, path: data/raw/rows.jsonl, sha256: "{DIGEST}", licence: Apache-2.0, classification: public}}, use: train}}
  bad: {{origin: {{kind: files, path: data/raw/bad.jsonl, sha256: "{DIGEST}", licence: Apache-2.0, classification: public}}, use: attack}}
  good: {{origin: {{kind: files, path: data/raw/good.jsonl, sha256: "{DIGEST}", licence: Apache-2.0, classification: public}}, use: benign}}
policy:
  training: {{classifications: [public], licences: [Apache-2.0]}}
  evaluation: {{classifications: [public], licences: [Apache-2.0]}}
  serving: {{classifications: [public], licences: [Apache-2.0]}}
""",
    "validate/toy.yaml": "expectations:\n  rows: {expect: expect_table_row_count_to_be_between, kwargs: {min_value: 1}}\n",
    "select/toy.yaml": "candidates:\n  made: {kind: made, licence: Apache-2.0}\nlimits: {licences: [Apache-2.0]}\npolicy: ${collect.policy}\n",
    "tune/sft.yaml": "steps: 10\n",
    "tune/lora.yaml": "steps: 20\nlora:\n  rank: 4\n",
    "evaluate/toy.yaml": "tasks:\n  intent: {phrasings: [intent], metric: exact_match}\n",
    "guard/toy.yaml": "policy: ${collect.policy}\nattacks:\n  bad: {use: test}\nbenign:\n  good: {use: split}\nheads: {attack: [injection]}\n",
    "redteam/toy.yaml": "attacks: [bad]\nbenign: [good]\n",
    "gate/toy.yaml": "absolute:\n  right: {metric: evaluate.intent, direction: at_least, limit: 0.5}\n",
    "package/toy.yaml": "licence: Apache-2.0\ndescription: A toy.\nintended_use: Tests.\nlimitations: All.\n",
    "experiment/default.yaml": "# @package _global_\ntune:\n  seed: 7\n",
    "experiment/adapter.yaml": "# @package _global_\ndefaults:\n  - override /tune: lora\n",
}


def small_checkout(root: Path) -> Path:
    """Write the real conf/*.py and a small set of YAML files; returns the root."""
    conf = root / "conf"
    conf.mkdir()
    for file in (ROOT / "conf").glob("*.py"):
        shutil.copy(file, conf)
    for name, text in SMALL.items():
        (conf / name).parent.mkdir(exist_ok=True)
        (conf / name).write_text(text.lstrip(), encoding="utf-8")
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small checkout of its own."""
    return small_checkout(tmp_path)


@pytest.fixture
def python(small: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m …` in the small checkout."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=small, capture_output=True, text=True, check=False)

    return call


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in a folder of its own, beside which engines can be written."""
    from tests.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def reference(hf: Path) -> TransformersEngine:
    """The engine that decides what is right."""
    from conf.schema import EngineSettings
    from stages.serve.engine_transformers import TransformersEngine

    return TransformersEngine(hf, EngineSettings(kind="transformers", quantization="float32", threads=1, batch=4))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with `tiny` cut down, run whole and committed. Copy it or clone it, never write into it."""
    from tests.checkout import EVERYTHING, commit, cut_down_tiny, ran, sh, working_tree

    folder = working_tree(tmp_path_factory.mktemp("tiny") / "trunkline", "tiny")
    cut_down_tiny(folder)
    commit(folder, "Use a small tiny")
    assert ran(sh(folder, "dvc", "repro")) == EVERYTHING
    commit(folder, "Run it")
    return folder
