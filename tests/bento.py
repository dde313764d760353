"""A repository in a folder with everything that `package` reads, around a small random model."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from conf.schema import EngineSettings
from stages.convert import to_ctranslate2
from stages.files import sha256, write_json
from stages.package import GUARD_FILES
from tests.guards import toy_guard
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[1]


def repository(folder: Path) -> Path:
    """Write conf/, stages/, params.yaml, data/ and models/ up to a promoting verdict."""
    for name in ("conf", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    hf = tiny_llama(folder / "hf")
    to_ctranslate2(hf, folder / "models/export/engine", EngineSettings().quantization)
    shutil.rmtree(hf)
    digest = sha256(folder / "models/export/engine")
    package = {"name": "kestrel-desk", "licence": "Apache-2.0", "description": "Routes messages.", "intended_use": "Support.", "limitations": "English | only."}
    serve = {"engine": {"threads": 1}, "guard": {"rules": {"override": {"pattern": r"ignore (all|previous) instructions"}}}, "system": "Be brief.",
             "max_tokens": 16, "max_prompt_tokens": 100, "port": 3999}  # fmt: skip
    write_json(folder / "params.yaml", {"package": package, "serve": serve})  # JSON is YAML
    row = {"kind": "files", "address": "data/raw/tickets.jsonl", "pinned": "0" * 64, "sha256": "0" * 64, "licence": "CC0-1.0", "classification": "public",
           "use": "train", "rows": 3, "files": ["tickets.jsonl"]}  # fmt: skip
    write_json(folder / "data/collect/manifest.json", {"tickets": row})
    for split in ("train", "validation", "test"):
        write_json(folder / f"data/preprocess/{split}.jsonl", {"id": split})
    chosen = {"candidate": "tiny", "licence": "Apache-2.0", "parameters": 30_000, "bytes": 1, "outcome": "chosen", "reasons": [], "score": 0.5, "stderr": 0.1}
    write_json(folder / "models/select/leaderboard.json", {"chosen": "tiny", "why": "It is the only one.", "probe": {}, "candidates": [chosen]})
    write_json(folder / "models/tune/summary.json", {"steps": 1})
    write_json(folder / "models/export/summary.json", {
        "digest": digest, "agreement": 0.99, "max_logit_difference": 0.5, "positions": 100, "probes": 4, "engine": "ctranslate2", "quantization": "int8",
        "dtype": "bfloat16", "parameters": 30_000, "bytes": 1,
    })  # fmt: skip
    task = {"score": 0.91, "stderr": 0.02, "n": 200, "spread": 0.01, "metric": "exact_match", "higher_is_better": True,
            "base": {"score": 0.0, "stderr": 0.0}, "gain": 0.91}  # fmt: skip
    write_json(folder / "models/evaluate/scores.json", {"tasks": {"support_intent": task}, "digest": digest})
    toy_guard(folder / "models/guard")
    guard = {name: sha256(folder / "models/guard" / name) for name in GUARD_FILES}
    write_json(folder / "models/guard/result.json", {"recall": 0.95, "false_alarms": 0.005, "families": {}, "benign": {}, "digest": guard})
    attacked = {"attack_success": 0.05, "false_alarms": 0.01, "canary_leaks": 0, "digest": digest, "guard": {"digest": guard}}
    write_json(folder / "models/redteam/result.json", attacked)
    rule = {"name": "routes", "metric": "evaluate.support_intent", "direction": "at_least", "limit": 0.8, "value": 0.91, "passed": True, "why": ""}
    write_json(folder / "models/gate/verdict.json", {"outcome": "promote", "promote": True, "reasons": [], "rules": [rule], "relative": [], "champion": None,
                                                      "digest": digest})  # fmt: skip
    return folder


def package(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the stage in a repository, as DVC does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-m", "stages.package"], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@functools.cache
def packaged() -> Path:
    """One repository with models/package, for all tests of a run: read it, never write into it."""
    folder = Path(tempfile.mkdtemp(prefix="trunkline-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    repository(folder)
    done = package(folder)
    assert done.returncode == 0, done.stderr
    return folder


if __name__ == "__main__":  # for tests that leave torch to another process
    repository(Path.cwd())
