"""Export: what is served is what was tuned, or it is held."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from conf.errors import DataError, ModelError
from conf.schema import EngineSettings, Export
from stages import export
from stages.export import Comparison, compare, conversation, distances, hold, main, merge
from stages.files import read_json, sha256, write_json, write_jsonl
from stages.records import Record
from stages.serve.engine import open_engine
from stages.serve.engine_transformers import TransformersEngine
from tests.models import tiny_llama

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
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    base = tiny_llama(tmp_path / "models/select/base", dtype="bfloat16")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).save_pretrained("models/tune/adapter")
    write_jsonl(Path("data/preprocess/validation.jsonl"), rows(4))
    configure()
    return tmp_path


def configure(engine: dict[str, object] | None = None, **settings: object) -> None:
    write_json(Path("params.yaml"), {"export": {"min_agreement": 0.5, **settings}, "serve": {"engine": {"threads": 1, **(engine or {})}}})


def test_the_adapter_is_merged_quantised_and_checked(repository: Path) -> None:
    main()
    summary = read_json(Path("models/export/summary.json"))
    assert summary["digest"] == sha256(Path("models/export/engine"))
    assert summary["probes"] == 4 and summary["positions"] > 20 and 0.5 <= summary["agreement"] <= 1 and 0 < summary["max_logit_difference"] < 5
    assert {p.name for p in Path("models/export/safetensors").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    assert json.loads(Path("models/export/safetensors/config.json").read_text())["dtype"] == "bfloat16"
    assert not list(Path(".dvc/tmp/trunkline/export").glob("*"))
    assert str(repository) not in "".join(p.read_text() for p in Path("models/export").rglob("*.json"))

    merge(Path("models/select/base"), Path("models/tune"), Path("merged"))
    merged, plain = TransformersEngine(Path("merged"), REFERENCE), TransformersEngine(Path("models/select/base"), REFERENCE)
    prompt = merged.chat.encode("where is my order")
    assert np.abs(merged.logprobs(prompt) - plain.logprobs(prompt)).max() > 0.1, "the adapter is not in the merged model"
    served = open_engine(Path("models/export/engine"), EngineSettings(threads=1)).logprobs(prompt)
    assert np.abs(merged.logprobs(prompt) - served).mean() < 0.2


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
    real = export.to_ctranslate2
    tiny_llama(Path("other"), seed=9)
    monkeypatch.setattr(export, "to_ctranslate2", lambda _, out, quantization: real(Path("other"), out, quantization))
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
