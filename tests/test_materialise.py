"""The engine is made from base and adapter in the same bytes everywhere, or an error says what is another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.files import read_json, remove, sha256, write_json
from stages.serve.engine import Sampling, open_engine
from stages.serve.engine_cache import KEPT, cache, opened
from stages.serve.grammar import Grammars
from stages.serve.materialise import RECIPE, Weights, not_plain, read_tensors, to_float32
from tests.conftest import ROOT
from tests.models import tiny_llama
from tests.variants import TARGETS, adapter_of, stored_variant

OPEN = """
import sys
from pathlib import Path
from typing import Literal
from stages.files import sha256
from stages.serve.engine_cache import opened
with opened(Path(sys.argv[1])) as engine:
    print(engine, sha256(engine), (engine / "model.bin").stat().st_ino)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_variant(tmp_path_factory.mktemp("variant"))


@pytest.fixture
def stored(made: Path, tmp_path: Path) -> Path:
    """A copy of what is stored, to be changed."""
    return shutil.copytree(made / "stored", tmp_path / "stored")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own."""
    monkeypatch.setenv("TRUNKLINE_ENGINES", str(tmp_path / "engines"))
    return tmp_path / "engines"


def start(folder: Path, script: str = OPEN, **environment: str) -> subprocess.Popen[str]:
    """Open in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_engine_is_that_of_ctranslate2s_converter(made: Path) -> None:
    with opened(made / "stored") as engine:
        assert sha256(engine) == sha256(made / "engine") == read_json(made / "stored" / RECIPE)["engine"]
    settings = EngineSettings(threads=1)
    assert open_engine(made / "stored", settings).generate([[1, 2, 5]], Sampling(max_tokens=8)) == open_engine(made / "engine", settings).generate(
        [[1, 2, 5]], Sampling(max_tokens=8)
    )


@pytest.mark.parametrize("kind", ["openvino", "ctranslate2"])
def test_an_open_engine_needs_nothing_of_the_cache_any_more(made: Path, kept: Path, kind: Literal["openvino", "ctranslate2"]) -> None:
    engine = open_engine(made / "stored", EngineSettings(kind=kind, threads=1))
    remove(kept)
    assert engine.generate([[1, 2, 5]], Sampling(max_tokens=4))[0].tokens
    Grammars(engine.chat).compile({"type": "object"})


def test_a_folder_without_a_recipe_is_opened_as_it_is(made: Path, kept: Path) -> None:
    with opened(made / "engine") as engine:
        assert engine == made / "engine"
    assert not kept.exists()


def test_the_merge_is_that_of_peft_up_to_rounding(made: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    expected = {name: tensor.numpy() for name, tensor in PeftModel.from_pretrained(model, made / "adapter").merge_and_unload().state_dict().items()}
    weights = Weights(made / "base", made / "adapter")
    assert set(weights.names) == set(expected)
    for name in weights.names:
        found = weights.whole(name)
        assert found.dtype == np.float32 and found.shape == expected[name].shape
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-6)
        assert (np.abs(found - before[name]).max() > 0.01) == any(target in name for target in TARGETS), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_is_read_exactly(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(5, 7).to(getattr(torch, dtype)), "b": torch.tensor([0.0, -0.0, 1e-40, 65504.0]).to(getattr(torch, dtype))}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    for name, tensor in read_tensors(tmp_path / "x.safetensors").items():
        assert to_float32(tensor).tobytes() == tensors[name].float().numpy().tobytes()


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"},
    ],
)
def test_the_bytes_are_the_same_for_other_threads_and_cpus(made: Path, environment: dict[str, str]) -> None:
    """`opened` raises on any other digest."""
    out, error = (process := start(made / "stored", **environment)).communicate()
    assert process.returncode == 0, error
    assert out.split()[1] == sha256(made / "engine")


def truncate(stored: Path) -> None:
    file = stored / "base/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def replace_base(stored: Path) -> None:
    remove(stored / "base")
    tiny_llama(stored / "base", seed=3, dtype="bfloat16")


def alter_adapter(stored: Path) -> None:
    file = stored / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def widen_adapter(stored: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = stored / "adapter/adapter_model.safetensors"
    save_file({name: np.concatenate([tensor, tensor]) if "lora_B" in name else tensor for name, tensor in load_file(file).items()}, file)


def deepen_adapter(stored: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = stored / "adapter/adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in load_file(file).items()}, file)


def change_recipe(**values: object) -> object:
    def change(stored: Path) -> None:
        write_json(stored / RECIPE, read_json(stored / RECIPE) | values)

    return change


def name_another_tensor(stored: Path) -> None:
    (stored / RECIPE).write_text((stored / RECIPE).read_text().replace("model.embed_tokens.weight", "model.embed.weight"))


def configure_adapter(stored: Path) -> None:
    file = stored / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"base/model\.safetensors is cut short or damaged"),
        (lambda stored: remove(stored / "base/model.safetensors"), r"base holds no \*\.safetensors"),
        (lambda stored: remove(stored / "adapter/adapter_model.safetensors"), r"adapter_model\.safetensors is missing"),
        (replace_base, r": base/model\.safetensors is not what was exported"),
        (alter_adapter, r": adapter/adapter_model\.safetensors is not what was exported"),
        (lambda stored: (stored / "tokenizer.json").write_text("{}"), rf"a file beside {RECIPE} is not what was exported"),
        (widen_adapter, r"is for another base: it changes .*weight of shape \(\d+, 32\), which is of shape"),
        (deepen_adapter, r"is for another base: it changes model\.layers\.7\..* which is not there"),
        (change_recipe(engine="0" * 64), f"not {'0' * 64}"),
        (change_recipe(model=3), "is no recipe"),
        (lambda stored: (stored / RECIPE).write_text("{"), "is no recipe"),
        (name_another_tensor, r"holds no model\.embed\.weight"),
        (configure_adapter, "no plain LoRA adapter: use_dora=True"),
    ],
)
def test_what_is_another_is_named(stored: Path, kept: Path, damage: object, reason: str) -> None:
    damage(stored)
    with pytest.raises(ModelError, match=reason) as found, opened(stored):
        pass
    assert found.value.remedy and not [path for path in kept.glob("*") if path.is_dir()], "nothing half-made is left"


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 2}}])
def test_only_a_plain_adapter_is_merged(made: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    """Each of these gives other weights than alpha / rank * B A."""
    assert not_plain(made / "adapter") is None
    assert next(iter(settings)) in str(not_plain(adapter_of(made / "base", tmp_path / "adapter", **settings)))


def test_the_second_opening_finds_the_first_ones_engine(made: Path) -> None:
    with opened(made / "stored") as engine:
        before = (engine / "model.bin").stat().st_ino
    with opened(made / "stored") as engine:
        assert (engine / "model.bin").stat().st_ino == before


def test_a_damaged_engine_in_the_cache_is_made_again(made: Path) -> None:
    with opened(made / "stored") as engine:
        (engine / "model.bin").write_bytes(b"")
    with opened(made / "stored") as engine:
        assert sha256(engine) == sha256(made / "engine")


def test_processes_that_open_at_once_get_one_engine(made: Path) -> None:
    processes = [start(made / "stored") for _ in range(4)]
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert len({out for out, _ in told}) == 1 and sha256(made / "engine") in told[0][0]


@pytest.mark.parametrize("calls", [1, 6, 13])
def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_an_engine(made: Path, kept: Path, calls: int) -> None:
    kill = f"""
import os, signal
from stages.serve import materialise
real, left = materialise.quantise, [None] * {calls}
def quantise(values):
    left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
    return real(values)
materialise.quantise = quantise
"""
    killed = start(made / "stored", kill + OPEN)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in kept.iterdir() if path.is_dir()]
    assert [path.name.startswith(".") for path in left] == [True], "killed before or after the work, not in it"
    with opened(made / "stored") as engine:
        assert sha256(engine) == sha256(made / "engine")
    assert [path for path in kept.iterdir() if path.is_dir()] == [engine]


def test_the_cache_keeps_the_engines_used_last(made: Path, kept: Path) -> None:
    for age in range(6):
        (kept / f"{age}").mkdir(parents=True)
        os.utime(kept / f"{age}", ns=(1, 10**9 * (100 - age)))
    (kept / ".x.partial").mkdir()
    with opened(made / "stored") as engine:
        assert {path.name for path in kept.iterdir() if path.is_dir()} == {engine.name, *map(str, range(KEPT - 1))}


def test_the_engine_that_is_opened_stays_though_all_others_are_of_the_future(made: Path, kept: Path) -> None:
    for age in range(KEPT):
        (kept / f"{age}").mkdir(parents=True)
        os.utime(kept / f"{age}", ns=(1, 10**9 * 2**33))
    with opened(made / "stored") as engine:
        assert engine.is_dir()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache() == tmp_path / "engines"
    monkeypatch.delenv("TRUNKLINE_ENGINES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert cache() == tmp_path / "home/trunkline/engines"
    Path(".dvc").mkdir()
    assert cache() == Path(".dvc/tmp/trunkline/engines")


def test_a_cache_that_cannot_be_written_is_told(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUNKLINE_ENGINES", str(tmp_path / "file/engines"))
    with pytest.raises(ModelError, match=r"file/engines: .*\n.*TRUNKLINE_ENGINES"), opened(made / "stored"):
        pass


def test_a_full_disk_is_told(made: Path, kept: Path) -> None:
    """The limit on a file's size stands for the disk's."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    process = start(made / "stored", limit + OPEN)
    assert "ModelError" in process.communicate()[1] and process.returncode == 1
    assert not [path for path in kept.iterdir() if path.is_dir()]
