"""Export: what is served is what was tuned, or it is held."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conf.errors import DataError, ModelError
from conf.schema import EngineSettings, Export
from stages.converters import CONVERT
from stages.export import Comparison, compare, conversation, distances, hold, main
from stages.files import read_json, sha256, write_json, write_jsonl
from stages.merge import merge
from stages.records import Record
from stages.serve.engine import open_engine
from stages.serve.engine_transformers import TransformersEngine
from tests.conftest import ROOT
from tests.models import tiny_llama
from tests.variants import adapter_of

REFERENCE = EngineSettings(kind="transformers", quantization="float32", threads=1)


def rows(count: int) -> list[dict[str, object]]:
    texts = ["where is my order", "cancel it", "refund please", "size of the tent"]
    return [
        Record(id=str(i), source="s", licence="MIT", classification="public", text=t, completion="order status",
               messages=[{"role": "user", "content": t}, {"role": "assistant", "content": "order status\nThank you."}]).row()
        for i, t in enumerate(texts[:count])
    ]  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a LoRA adapter and validation rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_ENGINES", str(tmp_path / "engines"))
    base = tiny_llama(tmp_path / "models/select/base", dtype="bfloat16")
    adapter_of(base, Path("models/tune/adapter"), target_modules=["q_proj", "up_proj"])
    write_jsonl(Path("data/preprocess/validation.jsonl"), rows(4))
    configure()
    return tmp_path


def configure(engine: dict[str, object] | None = None, **settings: object) -> None:
    write_json(Path("params.yaml"), {"export": {"min_agreement": 0.5, **settings}, "serve": {"engine": {"threads": 1, **(engine or {})}}})


def check_engine() -> None:
    """models/export/engine is the merged model, and not the base."""
    merge(Path("models/select/base"), Path("models/tune"), Path("merged"))
    merged, plain = TransformersEngine(Path("merged"), REFERENCE), TransformersEngine(Path("models/select/base"), REFERENCE)
    prompt = merged.chat.encode("where is my order")
    assert np.abs(merged.logprobs(prompt) - plain.logprobs(prompt)).max() > 0.1, "the adapter is not in the merged model"
    served = open_engine(Path("models/export/engine"), EngineSettings(threads=1)).logprobs(prompt)
    assert np.abs(merged.logprobs(prompt) - served).mean() < 0.2


def test_an_adapter_is_stored_beside_its_base_and_checked(repository: Path) -> None:
    main()
    summary = read_json(Path("models/export/summary.json"))
    assert summary["digest"] == sha256(Path("models/export/engine")) and summary["store"] == "adapter"
    assert summary["probes"] == 4 and summary["positions"] > 20 and 0.5 <= summary["agreement"] <= 1 and 0 < summary["max_logit_difference"] < 5
    assert {p.name for p in Path("models/export").iterdir()} == {"engine", "summary.json"}
    assert sha256(Path("models/export/engine/base")) == sha256(Path("models/select/base"))
    assert sha256(Path("models/export/engine/adapter")) == sha256(Path("models/tune/adapter"))
    assert not list(Path("models/export").rglob("model.bin")) and not list(Path(".dvc/tmp/trunkline/export").glob("*"))
    assert str(repository) not in "".join(p.read_text() for p in Path("models/export").rglob("*.json") if p.name != "adapter_config.json")
    check_engine()


def test_peft_loads_what_is_stored(repository: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    main()
    stored = Path("models/export/engine")
    ids = torch.tensor([[1, 5, 9]])
    base = AutoModelForCausalLM.from_pretrained(stored / "base", dtype=torch.float32)
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, stored / "adapter")(ids).logits
        merge(Path("models/select/base"), Path("models/tune"), Path("merged"))
        torch.testing.assert_close(tuned, AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_engine_itself_is_stored_on_demand_and_is_the_same_one(repository: Path) -> None:
    main()
    digest = read_json(Path("models/export/engine/recipe.json"))["engine"]
    configure(store="engine")
    main()
    assert sha256(Path("models/export/engine")) == digest and read_json(Path("models/export/summary.json"))["store"] == "engine"
    assert {p.name for p in Path("models/export/safetensors").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    assert json.loads(Path("models/export/safetensors/config.json").read_text())["dtype"] == "bfloat16"
    assert str(repository) not in "".join(p.read_text() for p in Path("models/export").rglob("*.json"))
    check_engine()


@pytest.mark.parametrize(
    ("lora", "engine", "reason"),
    [({"use_dora": True}, {}, "use_dora=True"), ({}, {"kind": "ctranslate2", "quantization": "int16"}, "no recipe gives a int16 engine")],
)
def test_what_has_no_recipe_is_stored_whole_and_said(
    repository: Path, caplog: pytest.LogCaptureFixture, lora: dict[str, object], engine: dict[str, object], reason: str
) -> None:
    adapter_of(Path("models/select/base"), Path("models/tune/adapter"), **lora)
    configure(engine)
    with caplog.at_level("INFO"):
        main()
    assert reason in caplog.text and "the whole engine is stored" in caplog.text
    assert read_json(Path("models/export/summary.json"))["store"] == "engine" and Path("models/export/engine/model.bin").is_file()


def test_a_merged_model_is_written_on_demand(repository: Path) -> None:
    command = [sys.executable, "-m", "stages.merge", "merged model"]
    for expected, told in ((0, "wrote merged model in bfloat16"), (1, "merged model is there already")):
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
        assert done.returncode == expected and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    merge(Path("models/select/base"), Path("models/tune"), Path("merged"))
    merged, written = (TransformersEngine(Path(name), REFERENCE).logprobs([1, 2, 3]) for name in ("merged", "merged model"))
    assert 0 < np.abs(merged - written).max() < 0.3, "bfloat16, and the same model"


def test_the_same_inputs_give_the_same_bytes(repository: Path) -> None:
    main()
    first = sha256(Path("models/export"))
    shutil.rmtree("models/export")
    main()
    assert sha256(Path("models/export")) == first


def test_a_fully_tuned_model_and_the_transformers_engine(repository: Path) -> None:
    shutil.rmtree("models/tune/adapter")
    tiny_llama(Path("models/tune/model"), seed=5)
    configure({"kind": "transformers", "quantization": "float32"}, dtype="float32")
    main()
    summary = read_json(Path("models/export/summary.json"))
    assert summary["agreement"] == 1 and summary["max_logit_difference"] < 1e-4
    assert sha256(Path("models/export/engine")) == sha256(Path("models/export/safetensors"))


def test_a_bad_export_is_held_and_not_published(repository: Path) -> None:
    configure(max_logit_difference=1e-6)
    with pytest.raises(ModelError, match=r"export\.max_logit_difference is 1e-06"):
        main()
    assert not Path("models/export").exists() and not list(Path("models").glob(".export*"))


def test_a_damaged_engine_is_seen(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of another model: what a wrong file would do."""
    real = CONVERT["openvino"]
    tiny_llama(Path("other"), seed=9)
    monkeypatch.setitem(CONVERT, "openvino", lambda _, out, quantization: real(Path("other"), out, quantization))
    with pytest.raises(ModelError, match=r"export\.min_agreement is 0\.5"):
        main()


def test_without_rows_nothing_is_checked_and_that_is_an_error(repository: Path) -> None:
    write_jsonl(Path("data/preprocess/validation.jsonl"), [])
    with pytest.raises(DataError, match="checked on nothing"):
        main()


def test_one_of_adapter_and_model_is_there(repository: Path) -> None:
    Path("models/tune/model").mkdir()
    with pytest.raises(ModelError, match="both adapter/ and model/"):
        merge(Path("models/select/base"), Path("models/tune"), Path("merged"))
    with pytest.raises(ModelError, match="neither adapter/ nor model/"):
        merge(Path("models/select/base"), Path("nowhere"), Path("merged"))


@pytest.mark.parametrize(
    ("agreement", "difference", "passes"), [(0.9, 5.0, True), (0.89, 0.0, False), (1.0, 5.1, False), (math.nan, 0.0, False), (1.0, math.nan, False)]
)
def test_the_limits(agreement: float, difference: float, passes: bool) -> None:
    found = Comparison(probes=1, positions=10, agreement=agreement, max_logit_difference=difference)
    if passes:
        hold(found, Export())
    else:
        with pytest.raises(ModelError, match=r"conf/export/"):
            hold(found, Export())


def test_distances_look_at_the_top_of_the_reference() -> None:
    reference = np.log(np.array([[0.5, 0.3, 0.2] + [1e-9] * 20, [0.3, 0.5, 0.2] + [1e-9] * 20], dtype=np.float32))
    exported = reference.copy()
    exported[0, 1], exported[1, 20] = exported[0, 1] + 1, 0.0
    agreed, largest = distances(reference, exported)
    assert agreed.tolist() == [False, False] and largest == pytest.approx(1)
    exported[0, 2] = np.nan
    assert math.isnan(distances(reference, exported)[1])


def test_the_answer_is_compared_and_not_the_question(repository: Path) -> None:
    engine = TransformersEngine(Path("models/select/base"), REFERENCE)
    ids, start = conversation(engine.chat, Record(**rows(1)[0]))
    assert engine.chat.decode(ids[start + 1 : -1]) == "order status\nThank you." and ids[-1] in engine.chat.eos_ids
    found = compare(engine, engine, [(ids, start)])
    assert found.positions == len(ids) - 1 - start and found.agreement == 1 and found.max_logit_difference == 0
