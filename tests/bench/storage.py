"""What ten promoted LoRA variants of one base store, in DVC's cache and on the remote: `python -m tests.bench.storage [a base's folder]`.

A DVC repository of its own with a local remote. For each variant a new adapter takes the place of models/tune/adapter, the real export and
package run, and models/select/base, models/tune, models/export and models/package are added to the cache and pushed. What lies in
cache and remote at the end is held against the base. Without a folder the base is a random Llama of half SmolLM2-135M's widths, vocabulary
and rank, thirty blocks deep, twelve of them tuned: a quarter of SmolLM2-135M and of its adapter, so the proportions are those of
`default`, and whatever does not grow with the model counts four times as much. What evaluate and redteam keep of a variant (their
samples) comes on top, as dvc.lock gives its size beside its base's. `theirs` is `export.store: engine`: two variants are stored, and each
further one counts as the second did.

What opening such an engine costs stands in stages/serve/engine_cache.py.

What was tried, and did not help:

* the difference of a variant's int8 engine to its base's (SmolLM2's shape, random adapter): 18% of the bytes change, zlib leaves 13.6 MB, 3.5 times
  a bfloat16 adapter; the base's engine is half a base more. Ten variants: 2.0 bases.
* engines made anew after `dvc pull`: a fresh clone would then run stages, which it must not.
* the adapter in float32, as it is trained: 7.8 MB of 269 a variant, so ten would take 1.29 bases with nothing else.
* ctranslate2's own specifications instead of a recipe: they need a table of names per architecture, and import torch where it is installed.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from stages import export
from stages.files import read_json, remove, write_json, write_jsonl
from stages.records import Record
from tests import bento
from tests.bench.rows import Row, show
from tests.conftest import ROOT
from tests.models import tiny_llama
from tests.variants import adapter_of

VARIANTS = 10
BAR = 1.2
STORED = ("models/select/base", "models/tune", "models/export", "models/package")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARE = 2
"""The made base's widths, vocabulary and rank are SmolLM2's divided by this."""


def make_base(folder: Path) -> Path:
    """A random base of SmolLM2's proportions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_llama(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152 // SHARE, hidden_size=576 // SHARE, intermediate_size=1536 // SHARE, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_adapter(base: Path, out: Path, seed: int, rank: int) -> None:
    """A random adapter on the last twelve blocks, in the type in which tune keeps it."""
    import torch
    from safetensors.torch import load_file, save_file

    remove(out)
    layers = range(read_json(base / "config.json")["num_hidden_layers"])[-12:]
    adapter_of(base, out, seed, r=rank, target_modules=TARGETS, layers_to_transform=list(layers))
    file = out / "adapter_model.safetensors"
    tensors = {name: (tensor / 10).to(torch.bfloat16) for name, tensor in load_file(file).items()}
    remove(file)
    save_file(tensors, file, {"format": "pt"})


def start(folder: Path, base: Path, kind: str) -> None:
    """A repository with everything that export and package read, and a remote beside it."""
    bento.repository(folder)
    remove(folder / "models/export")
    shutil.copytree(base, folder / "models/select/base")
    # a random model agrees with nothing: what is measured here is bytes
    limits = {"store": kind, "probes": 1, "min_agreement": 0.0, "max_logit_difference": 1e3}
    write_json(folder / "params.yaml", read_json(folder / "params.yaml") | {"export": limits})
    talk = [{"role": "user", "content": "where is my order"}, {"role": "assistant", "content": "order status"}]
    row = Record(id="0", source="s", licence="MIT", classification="public", text="where is my order", messages=talk)
    write_jsonl(folder / "data/preprocess/validation.jsonl", [row.row()])
    for command in (["init", "--no-scm", "-q"], ["config", "core.analytics", "false"], ["remote", "add", "-d", "-q", "there", str(folder.parent / "remote")]):
        dvc(folder, *command)


def dvc(folder: Path, *arguments: str) -> None:
    """Run DVC."""
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True, capture_output=True)


def add_variant(folder: Path, seed: int, rank: int) -> None:
    """Tune (a random adapter), export, promote, package, store and push."""
    write_adapter(folder / "models/select/base", folder / "models/tune/adapter", seed, rank)
    with contextlib.chdir(folder):
        export.main()
    digest = read_json(folder / "models/export/summary.json")["digest"]
    for name in ("evaluate/scores.json", "redteam/result.json", "gate/verdict.json"):
        write_json(folder / "models" / name, read_json(folder / "models" / name) | {"digest": digest})
    done = bento.package(folder)
    if done.returncode:
        raise RuntimeError(done.stderr)
    dvc(folder, "add", "-q", *STORED)
    dvc(folder, "push", "-q")


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def grow(base: Path, kind: str, variants: int, rank: int) -> list[tuple[int, int]]:
    """Bytes in the cache and on the remote after each variant."""
    with tempfile.TemporaryDirectory(prefix="trunkline-storage-") as scratch:
        folder = Path(scratch) / "repository"
        start(folder, base, kind)
        found = []
        for seed in range(variants):
            add_variant(folder, seed, rank)
            found.append((size(folder / ".dvc/cache"), size(folder.parent / "remote")))
        return found


def samples() -> float:
    """What evaluate and redteam put into the cache, as a share of a base, in the run that dvc.lock tells of."""
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    outs = {out["path"]: out["size"] for name in ("evaluate", "redteam") for out in stages[name]["outs"]}
    return sum(outs.values()) / next(dep["size"] for dep in stages["tune"]["deps"] if dep["path"] == "models/select/base")


def measure(base: Path, rank: int) -> list[Row]:
    """Cache and remote, each against the base."""
    ours, whole = grow(base, "adapter", VARIANTS, rank), grow(base, "engine", 2, rank)
    found, one = [], size(base)
    for at, place in enumerate(("cache", "remote")):
        extra = VARIANTS * samples()
        ratio = ours[-1][at] / one + extra
        theirs = (whole[0][at] + (VARIANTS - 1) * (whole[1][at] - whole[0][at])) / one + extra
        what = f"storage: {VARIANTS} variants of a base of {one / 1e6:.0f} MB, {place}"
        found.append(Row(what=what, ours=f"{ratio:.2f} bases", theirs=f"{theirs:.2f} bases", ratio=ratio, bar=f"≤ {BAR}", met=ratio <= BAR))
    return found


def rows(base: Path | None = None) -> list[Row]:
    """Measure on a base, or on a made one."""
    if base is not None:
        return measure(base, 16)
    with tempfile.TemporaryDirectory(prefix="trunkline-base-") as scratch:
        return measure(make_base(Path(scratch) / "base"), 16 // SHARE)


def main() -> None:
    """Print the table."""
    found = rows(Path(sys.argv[1])) if len(sys.argv) > 1 else rows()
    show(found)


if __name__ == "__main__":
    main()
