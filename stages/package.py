"""Build the Bento: the engine that passed the gate, the service's own code, pinned requirements, model card and provenance.

Reads:  models/gate/verdict.json, models/export, models/guard, models/redteam, models/evaluate/scores.json, models/select/leaderboard.json,
        models/tune/summary.json, data/collect/manifest.json, data/preprocess, params.yaml, and the service's modules
Writes: models/package/ (a Bento as a plain directory: `bentoml serve <absolute path>`)
Config: package, serve; and all of it, for its digest

Only what a passing verdict names is packaged: `promote` is true, and its digest, like that of the scores and of the red-team
result, is the digest of models/export/engine; it is checked again inside the Bento. The same inputs give the same bytes: the
version is the engine's digest, and the creation time in bento.yaml is a constant.

The git commit is not in the Bento. One and the same build is made before its own commit exists (a working tree), at it (CI), and
after it (`verify`); with a commit inside, no two of them would be equal. The commit of a Bento is the one whose dvc.lock
names its bytes; the commit of this build goes to .dvc/tmp/trunkline/package/commit.json, which no stage depends on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import conf
from conf.errors import DataError, Held, ModelError
from conf.schema import Package, Serve
from conf.yaml import read
from stages import platform
from stages.card import model_card
from stages.closure import closure
from stages.files import canonical, publish, read_json, remove, sha256, write_json
from stages.run import WORK, refusal, scratch

EXPORT, REDTEAM, SCORES, VERDICT = Path("models/export"), Path("models/redteam"), Path("models/evaluate/scores.json"), Path("models/gate/verdict.json")
GUARD, GUARD_FILES = Path("models/guard"), ("guard.json", "weights.safetensors")
LEADERBOARD, MANIFEST, ROWS = Path("models/select/leaderboard.json"), Path("data/collect/manifest.json"), Path("data/preprocess")
INPUTS = (
    MANIFEST, *(ROWS / f"{split}.jsonl" for split in ("train", "validation", "test")), LEADERBOARD, Path("models/tune/summary.json"),
    EXPORT / "engine", EXPORT / "summary.json", *(GUARD / name for name in (*GUARD_FILES, "result.json")), REDTEAM / "result.json", SCORES, VERDICT,
)  # fmt: skip
"""What the provenance gives the digests of."""
OUT = Path("models/package")
SERVICE = "stages.serve.service"
ENGINES = {
    "openvino": ("stages.serve.engine_openvino", ("openvino",)),
    "ctranslate2": ("stages.serve.engine_ctranslate2", ("ctranslate2",)),
    "llamacpp": ("stages.serve.engine_llamacpp", ("llama-cpp-python",)),
    "transformers": ("stages.serve.engine_transformers", ("torch", "transformers")),
    "vllm": ("stages.serve.engine_vllm", ("vllm",)),
    "upstream": ("stages.serve.upstream.engine", ("openai",)),
}
"""Engine -> its module, and the distributions that it imports."""
IMPORTED = ("anyio", "bentoml", "confusable-homoglyphs", "fastapi", "google-re2", "httptools", "jinja2", "kingfisher-secret-scanner", "limits", "llguidance",
            "numpy", "opentelemetry-api", "orjson", "phonenumbers", "prometheus-client", "psycopg", "psycopg-binary", "pydantic", "python-stdnum", "regex",
            "safetensors", "SQLAlchemy", "starlette", "tenacity", "tokenizers", "uvloop")  # fmt: skip
"""Distributions that the service imports, whatever its engine; uvicorn takes httptools and uvloop where they are."""
MADE_WITH = ("bentoml", "ctranslate2", "datasets", "datatrove", "lm-eval", "openvino", "peft", "safetensors", "tokenizers", "torch", "transformers", "trl")
"""Distributions whose versions the provenance names."""

log = logging.getLogger(__name__)


def check(verdict: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], digest: str) -> None:
    """Let through only the very engine that was measured, attacked and promoted.

    Args:
        verdict: the gate's.
        results: file -> what was measured; each names the digest that it measured.
        digest: of the engine folder.

    Raises:
        DataError: one of them is no object.
        Held: there is no passing verdict, or one of the digests is another one.
    """
    for name, result in {str(VERDICT): verdict, **results}.items():
        if not isinstance(result, Mapping):
            raise DataError(f"{name} holds a {type(result).__name__}, not an object", "remove it and run `dvc repro`")
    if verdict.get("promote") is not True:
        raise Held(f"{VERDICT}: the verdict is {verdict.get('outcome')!r}", "only a promoted model is packaged: see its reasons")
    for name, result in {str(VERDICT): verdict, **results}.items():
        if result.get("digest") != digest:
            what = f"{name} is about the engine {result.get('digest')}, and {EXPORT / 'engine'} is {digest}"
            raise Held(what, "run `dvc repro`: what is packaged must be what was gated")


def check_guard(measured: Mapping[str, object]) -> None:
    """Let through only the very classifier that was measured, and behind which the model was attacked.

    Args:
        measured: file -> what it says of the guard, with the digest of each of its files.

    Raises:
        Held: one of the files is another one.
    """
    for name in GUARD_FILES:
        digest = sha256(GUARD / name)
        for path, result in measured.items():
            digests = result.get("digest") if isinstance(result, Mapping) else None
            named = digests.get(name) if isinstance(digests, Mapping) else None
            if named != digest:
                raise Held(f"{path} is about {name} {named}, and {GUARD / name} is {digest}", "run `dvc repro`: what is packaged must be what was gated")


def requirements(kind: str, *, transformer: bool = False) -> list[str]:
    """`name==version` of exactly what the service imports, as installed here. Args: kind: of the engine. transformer: whether the guard has one.

    Raises:
        ModelError: one of them is not installed.
    """
    pins = []
    for name in sorted({*IMPORTED, *ENGINES[kind][1], *(ENGINES["transformers"][1] if transformer else ())}):
        try:
            pins.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError as error:
            raise ModelError(f"{name} is not installed, and the service needs it", "pip install -r requirements.txt") from error
    return pins


def provenance(digest: str) -> dict[str, Any]:
    """Where the model comes from: digests of every input, of the whole configuration (its values as canonical JSON) and of every source; versions;
    and the platform on which each stage computed."""
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in MADE_WITH}
    return {
        "engine": digest,
        "params": hashlib.sha256(canonical(read(conf.PARAMS)).encode()).hexdigest(),
        "inputs": {str(path): sha256(path) for path in INPUTS if path.exists()},
        "sources": {name: {key: entry[key] for key in ("address", "pinned", "sha256") if key in entry} for name, entry in read_json(MANIFEST).items()},
        "versions": {"python": f"{sys.version_info.major}.{sys.version_info.minor}", **versions},
        "platforms": platform.recorded(),
        "commit": "the commit whose dvc.lock names models/package with the digest of this folder",
    }


def lay_out(context: Path, settings: Package, serve: Serve, digest: str) -> None:
    """Put everything that the Bento holds into a build context: copies, no links."""
    shutil.copytree(EXPORT / "engine", context / "engine")
    (context / "guard").mkdir()
    for name in GUARD_FILES:
        shutil.copyfile(GUARD / name, context / "guard" / name)
    unused = {module for kind, (module, _) in ENGINES.items() if kind != serve.engine.kind}
    unused |= set() if serve.guard.transformer else {"stages.serve.guard.transformer"}
    for path in closure(SERVICE, leave_out={"conf.yaml", *unused}):
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, context / path)
    write_json(context / "serve.json", {"name": settings.name, "digest": digest, "guard": sha256(context / "guard"), "serve": asdict(serve)})
    write_json(context / "provenance.json", provenance(digest))
    card = model_card(settings, digest=digest, manifest=read_json(MANIFEST), leaderboard=read_json(LEADERBOARD), scores=read_json(SCORES),
                      redteam=read_json(REDTEAM / "result.json"), guard=read_json(GUARD / "result.json"), verdict=read_json(VERDICT),
                      export=read_json(EXPORT / "summary.json"), platforms=platform.recorded())  # fmt: skip
    (context / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    write_json(context / "bentofile.yaml", {  # JSON is YAML
        "service": f"{SERVICE}:Service", "name": settings.name, "description": "file:MODEL_CARD.md", "include": ["*"], "exclude": ["bentofile.yaml"],
        "labels": {"digest": digest},
        "python": {"packages": requirements(serve.engine.kind, transformer=serve.guard.transformer is not None), "lock_packages": False},
    })  # fmt: skip


def build(context: Path, store: Path, version: str) -> Path:
    """Run `bentoml build` in a process of its own, which sees the context's modules and not this repository's; returns the Bento's folder.

    Raises:
        ModelError: pip is missing, or the build fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError("bentoml build needs pip in the environment", "python -m ensurepip")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"BENTOML_HOME": str(store), "BENTOML_DO_NOT_TRACK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "bentoml", "build", "--version", version, "--output", "tag", "."]
    done = subprocess.run(command, cwd=context, env=environment, capture_output=True, text=True, check=False)
    built = sorted((store / "bentos").glob(f"*/{version}"))
    if done.returncode and (words := refusal(done.stderr)):
        raise ModelError(f"bentoml build: {words}: {store.parent}", "free some space or make it writable, then `dvc repro`")
    if done.returncode or len(built) != 1:
        raise ModelError(f"bentoml build failed:\n{(done.stderr or done.stdout).strip()[-2000:]}", "see the message of BentoML")
    return built[0]


def normalise(bento: Path) -> None:
    """Set the creation time in bento.yaml to a constant."""
    from ruamel.yaml import YAML

    yaml, path = YAML(), bento / "bento.yaml"
    value = yaml.load(path)
    value["creation_time"] = "1970-01-01T00:00:00+00:00"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yaml.dump(value, file)


def record_commit(package: Path) -> None:
    """Note beside the costs which commit this build was made at; nothing where git does not know one."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    write_json(WORK / "package" / "commit.json", {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain")), "package": sha256(package)})


def main() -> None:
    """Check, lay out, build, verify, publish."""
    settings: Package = conf.load("package")
    serve: Serve = conf.load("serve")
    digest = sha256(EXPORT / "engine")
    check(read_json(VERDICT), {str(path): read_json(path) for path in (EXPORT / "summary.json", SCORES, REDTEAM / "result.json")}, digest)
    check_guard({str(GUARD / "result.json"): read_json(GUARD / "result.json"), str(REDTEAM / "result.json"): read_json(REDTEAM / "result.json").get("guard")})
    remove(WORK / "package")
    with scratch("trunkline-package", Path(tempfile.gettempdir())) as folder:  # not under .dvc/: BentoML refuses hidden folders
        context, store = folder.resolve() / "context", folder.resolve() / "store"
        context.mkdir()
        lay_out(context, settings, serve, digest)
        bento = build(context, store, digest[:16])
        normalise(bento)
        with publish(OUT) as out:
            shutil.copytree(bento, out, ignore=shutil.ignore_patterns("__pycache__"))
            if (inside := sha256(out / "src" / "engine")) != digest:
                raise ModelError(f"the engine inside the Bento is {inside}, and {digest} was gated", "free some disk space and run `dvc repro package`")
    record_commit(OUT)
    if mixed := platform.mixed(platform.recorded()):
        log.warning("the stages of this model ran on different platforms (%s): to make its bytes again takes all of them", "; ".join(mixed))
    log.info("packaged %s:%s; `bentoml serve %s` serves it", settings.name, digest[:16], "$PWD/" + str(OUT))


if __name__ == "__main__":
    from stages.run import run

    run(main)
