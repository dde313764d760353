"""The Bento: only what was promoted, whole, without links, and the same bytes for the same inputs."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from conf.errors import Held, ModelError
from conf.schema import EngineSettings, Package
from stages.card import model_card
from stages.closure import closure
from stages.files import canonical, read_json, sha256, write_json
from stages.package import check, requirements
from stages.serve.engine import Sampling, open_engine
from tests.bento import ROOT, package, packaged
from tests.variants import stored_variant

GOOD = {"outcome": "promote", "promote": True, "digest": "a"}


def copy(tmp_path: Path) -> Path:
    """A copy of the repository, to be changed."""
    return shutil.copytree(packaged(), tmp_path / "repository")


def test_what_passed_goes_through() -> None:
    check(GOOD, {"scores": {"digest": "a"}}, "a")


@pytest.mark.parametrize(
    ("verdict", "results", "reason"),
    [
        ({**GOOD, "promote": False, "outcome": "hold"}, {}, "the verdict is 'hold'"),
        ({**GOOD, "promote": "true"}, {}, "the verdict is"),
        ({}, {}, "the verdict is None"),
        ({**GOOD, "digest": "b"}, {}, r"verdict\.json is about the engine b"),
        (GOOD, {"scores.json": {"digest": "b"}}, r"scores\.json is about the engine b"),
        (GOOD, {"scores.json": {}}, r"scores\.json is about the engine None"),
    ],
)
def test_anything_else_is_held(verdict: dict[str, object], results: dict[str, dict[str, object]], reason: str) -> None:
    with pytest.raises(Held, match=reason):
        check(verdict, results, "a")


def test_an_altered_engine_is_not_packaged(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    before = sha256(folder / "models/package")
    with (folder / "models/export/engine/model.bin").open("ab") as file:
        file.write(b"x")
    done = package(folder)
    assert done.returncode == 1 and "run `dvc repro`" in done.stderr and "Traceback" not in done.stderr
    assert sha256(folder / "models/package") == before


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    shutil.rmtree(folder / "models/package")
    done = package(folder)
    assert done.returncode == 0, done.stderr
    assert sha256(folder / "models/package") == sha256(packaged() / "models/package")


def test_a_bento_of_base_and_adapter_answers_without_torch(tmp_path: Path) -> None:
    """It holds no engine: the service makes it, with what its requirements name."""
    folder, made = copy(tmp_path), stored_variant(tmp_path / "variant")
    shutil.rmtree(folder / "models/export/engine")
    shutil.copytree(made / "stored", folder / "models/export/engine")
    digest = sha256(made / "stored")
    for name in ("export/summary.json", "evaluate/scores.json", "redteam/result.json", "gate/verdict.json"):
        write_json(folder / "models" / name, read_json(folder / "models" / name) | {"digest": digest})
    done = package(folder)
    assert done.returncode == 0, done.stderr
    src = folder / "models/package/src"
    assert not list(src.rglob("model.bin")) and (src / "engine/base/model.safetensors").is_file()
    script = """
import sys
from pathlib import Path
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from stages.serve.assistant import Assistant
from stages.serve.wire import ChatRequest
assistant = Assistant.load(Path())
asked = ChatRequest.model_validate({"model": "kestrel-desk", "messages": [{"role": "user", "content": "cancel my order"}]})
answer = assistant.engine.generate(assistant.prompts(asked, assistant.screen(asked).texts), assistant.sampling(asked))[0].text
print(assistant.digest, answer.encode())
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TRUNKLINE_ENGINES": str(tmp_path / "engines")}
    answered = subprocess.run([sys.executable, "-B", "-c", script], cwd=src, env=environment, capture_output=True, text=True, check=False)
    assert answered.returncode == 0, answered.stderr
    engine = open_engine(made / "engine", EngineSettings(threads=1))
    prompt = engine.chat.prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "cancel my order"}])
    assert answered.stdout == f"{digest} {engine.generate([prompt], Sampling(max_tokens=16))[0].text.encode()}\n"
    assert [path.name for path in (tmp_path / "engines").iterdir() if path.is_dir()] == [sha256(made / "engine")]


@pytest.mark.parametrize("result", ["guard/result.json", "redteam/result.json"])
def test_a_guard_that_was_not_measured_is_not_packaged(tmp_path: Path, result: str) -> None:
    folder = copy(tmp_path)
    path = folder / "models" / result
    path.write_text(path.read_text().replace(sha256(folder / "models/guard/guard.json"), "0" * 64))
    done = package(folder)
    assert done.returncode == 1
    assert f"models/{result} is about guard.json {'0' * 64}" in done.stderr


def test_links_of_the_cache_are_dereferenced(tmp_path: Path) -> None:
    """`cache.type symlink` makes the engine a folder of links into .dvc/cache."""
    folder = copy(tmp_path)
    engine = folder / "models/export/engine"
    for path in list(engine.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert package(folder).returncode == 0
    bento = folder / "models/package"
    assert not [path for path in bento.rglob("*") if path.is_symlink()]
    assert sha256(bento) == sha256(packaged() / "models/package")


def test_the_bento_holds_what_it_needs_and_no_more() -> None:
    src = packaged() / "models/package/src"
    assert sha256(src / "engine") == read_json(src / "serve.json")["digest"] == read_json(packaged() / "models/gate/verdict.json")["digest"]
    modules = {path.relative_to(src).as_posix() for path in src.rglob("*.py")}
    assert "stages/serve/engine_openvino.py" in modules and "stages/serve/guard/guard.py" in modules
    assert not modules & {"stages/package.py", "stages/serve/engine_transformers.py", "stages/serve/engine_vllm.py", "conf/yaml.py", "stages/run.py"}
    assert not list(src.rglob("params.yaml")) and not list(src.rglob("__pycache__"))
    for path in (packaged() / "models/package").rglob("*"):
        assert path.is_dir() or str(packaged()).encode() not in path.read_bytes(), f"{path} names a folder of this machine"


def test_the_requirements_are_exactly_the_imports() -> None:
    src = packaged() / "models/package/src"
    imported = {
        name.partition(".")[0]
        for path in src.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
    }
    pinned = (src.parent / "env/python/requirements.txt").read_text().split()
    known = importlib.metadata.packages_distributions() | {"opentelemetry": ["opentelemetry-api"]}  # a namespace of many
    needed = {known[name][0] for name in imported - set(sys.stdlib_module_names) - {"conf", "stages"}}
    assert {line.partition("==")[0].lower().replace("_", "-") for line in pinned} == {name.lower().replace("_", "-") for name in needed} | {
        "python-stdnum",  # stages.pii imports its modules by name
        "psycopg",  # SQLAlchemy imports the driver that the URL names
        "psycopg-binary",
        "httptools",  # uvicorn takes it where it is
        "uvloop",
    }
    assert all("==" in line and "+" not in line for line in pinned)
    for pins in (requirements("transformers"), requirements("ctranslate2", transformer=True)):
        assert {"torch", "transformers"} <= {line.partition("==")[0] for line in pins}
    with pytest.raises(ModelError, match="vllm is not installed"):
        requirements("vllm")


def test_the_provenance_names_every_input() -> None:
    found = read_json(packaged() / "models/package/src/provenance.json")
    assert found["sources"]["tickets"]["sha256"] == "0" * 64
    for name, digest in found["inputs"].items():
        assert sha256(packaged() / name) == digest
    assert {"data/collect/manifest.json", "models/evaluate/scores.json", "models/gate/verdict.json", "models/export/engine"} <= set(found["inputs"])
    assert found["versions"]["ctranslate2"] and len(found["params"]) == 64
    commit = read_json(packaged() / ".dvc/tmp/trunkline/package/commit.json")
    assert commit["package"] == sha256(packaged() / "models/package")


def test_a_comment_in_the_configuration_changes_nothing(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    params = folder / "params.yaml"
    params.write_text("# another digest of conf/\n" + params.read_text())
    assert package(folder).returncode == 0
    assert sha256(folder / "models/package") == sha256(packaged() / "models/package")


def test_the_model_card_is_one() -> None:
    card = ModelCard((packaged() / "models/package/src/MODEL_CARD.md").read_text())
    assert card.data.license == "apache-2.0" and card.data.eval_results[0].metric_value == 0.91
    digest = read_json(packaged() / "models/export/summary.json")["digest"]
    for said in ("| tickets | train | CC0-1.0 | public | 3 |", "| support_intent | exact_match | 0.91 |", "| attack success | 0.05 |", "English | only.",
                 "| routes | evaluate.support_intent | at least | 0.8 | 0.91 | yes |", digest):  # fmt: skip
        assert said in card.text


def test_the_model_card_survives_odd_text() -> None:
    settings = Package(licence="LicenseRef-House", description="a: b\n---\n# x", intended_use="- y", limitations="z")
    models = packaged() / "models"
    row = {"use": "train", "licence": "MIT", "classification": "public", "rows": 1, "address": "a|b\nc"}
    card = ModelCard(model_card(
        settings, digest="d", manifest={"one": row}, leaderboard=read_json(models / "select/leaderboard.json"),
        scores={"tasks": {"t": {"score": None, "stderr": None, "n": 0, "metric": "acc"}}}, redteam={}, guard={}, verdict={"outcome": "promote"},
        export=read_json(models / "export/summary.json"), platforms={},
    ))  # fmt: skip
    assert card.data.license == "other" and card.data.license_name == "LicenseRef-House"
    assert "a\\|b c" in card.text and "| t | acc | - | - | - | - | 0 |" in card.text


def test_the_closure_follows_imports_inside_functions(tmp_path: Path) -> None:
    for name, text in {
        "stages/__init__.py": "", "stages/a.py": "def f():\n    from stages.b import g\n", "stages/b.py": "import stages.c, json\nfrom stages import d\n",
        "stages/c.py": "", "stages/d/__init__.py": "from stages.e import x\n", "stages/e.py": "x = 1\n", "stages/other.py": "",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [str(p) for p in closure("stages.a", root=tmp_path)] == [
        "stages/__init__.py", "stages/a.py", "stages/b.py", "stages/c.py", "stages/d/__init__.py", "stages/e.py"
    ]  # fmt: skip
    assert Path("stages/e.py") not in closure("stages.a", leave_out={"stages.d"}, root=tmp_path)
    assert Path("stages/serve/guard/guard.py") in closure("stages.serve.service", root=ROOT)


def test_canonical_settings_are_read_back() -> None:
    facts = read_json(packaged() / "models/package/src/serve.json")
    assert json.loads(canonical(facts)) == facts and facts["serve"]["system"] == "Be brief."


def test_a_missing_verdict_says_what_to_run(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "models/gate/verdict.json").unlink()
    done = package(folder)
    assert done.returncode == 1 and "verdict.json is missing" in done.stderr and "Traceback" not in done.stderr
    write_json(folder / "models/gate/verdict.json", {"outcome": "inconclusive", "promote": False})
    assert "the verdict is 'inconclusive'" in package(folder).stderr.replace("\n", "")
