"""Merge, convert and quantise the tuned model for the engine that serves it, and check the result against the merged one.

Reads:  models/select/base, models/tune/adapter or models/tune/model, data/preprocess/validation.jsonl
Writes: models/export/engine (what is evaluated, attacked and served), models/export/safetensors (merged, in `export.dtype`,
        for transformers and vLLM), models/export/summary.json
Config: export, serve.engine

The check runs both models over the same validation conversations, reference answer included, and compares the distributions
at the positions that the product answers from: after the last token of the prompt, and after each token of the answer.
"""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import conf
from conf.errors import DataError, ModelError
from conf.schema import EngineSettings, Export
from stages.convert import copy_tokenizer, to_ctranslate2
from stages.files import DISK, publish, remove, sha256, write_json
from stages.records import Record, read_records
from stages.run import WORK, progress
from stages.serve.chat import Chat
from stages.serve.engine import Engine, open_engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BASE = Path("models/select/base")
TUNED = Path("models/tune")
VALIDATION = Path("data/preprocess/validation.jsonl")
OUT = Path("models/export")
TOP = 10
"""Most likely tokens of the merged model whose log-probabilities are compared."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How close the exported engine is to the merged model."""

    probes: int
    """Conversations compared."""
    positions: int
    """Positions compared."""
    agreement: float
    """Share of the positions at which both say the same next token."""
    max_logit_difference: float
    """Largest difference of a log-probability among the merged model's ten most likely tokens, in nats."""


def merge(base: Path, tuned: Path, out: Path) -> int:
    """Write the tuned model in float32 with the base's tokenizer, chat template and generation config.

    Args:
        tuned: folder that holds `adapter/` (LoRA, merged into the base) or `model/` (all weights).

    Returns:
        The number of parameters.

    Raises:
        ModelError: there is neither of them, or both; one is damaged; or the adapter is of another base.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    broken = (SafetensorError, ValueError, TypeError, LookupError, RuntimeError, OSError, UserWarning)
    """What transformers and peft raise for files that are damaged or do not fit."""
    adapter, model = tuned / "adapter", tuned / "model"
    if adapter.is_dir() == model.is_dir():
        raise ModelError(f"{tuned} holds {'both adapter/ and model/' if model.is_dir() else 'neither adapter/ nor model/'}", "run `dvc repro tune`")
    if adapter.is_dir() and not (adapter / "adapter_model.safetensors").is_file():  # peft would take a pickle instead
        raise ModelError(f"{adapter} has no adapter_model.safetensors", "pickled weights are not loaded: run `dvc repro tune`")
    source, stage = (base, "select") if adapter.is_dir() else (model, "tune")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False)
    except broken as error:
        refuse(f"{source} cannot be loaded", error, f"it was changed or cut short: remove it and run `dvc repro {stage}`")
    if adapter.is_dir():
        from peft import PeftModel

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay as they were before training
                loaded = PeftModel.from_pretrained(loaded, adapter, is_trainable=False, use_safetensors=True).merge_and_unload(safe_merge=True)
        except broken as error:
            refuse(f"{adapter} does not fit {base}", error, "it is damaged, or of another base: remove it and run `dvc repro tune`")
    loaded.save_pretrained(out)
    copy_tokenizer(base, out)
    return int(loaded.num_parameters())


def refuse(what: str, error: Exception, remedy: str) -> NoReturn:
    """Tell what a library said of a file.

    Raises:
        ModelError: always, but for an error of the disk.
    """
    if isinstance(error, OSError) and error.errno in DISK:
        raise error
    raise ModelError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:500]}", remedy) from error


def cast(merged: Path, out: Path, dtype: str) -> None:
    """Write the merged model in another type."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, dtype), local_files_only=True).save_pretrained(out)
    copy_tokenizer(merged, out)


def conversation(chat: Chat, record: Record) -> tuple[list[int], int]:
    """Tokens of prompt, reference answer and end token, and the position from which the answer is predicted."""
    prompt = chat.prompt(record.messages[:-1])
    return [*prompt, *chat.encode(record.messages[-1]["content"]), min(chat.eos_ids)], len(prompt) - 1


def compare(reference: Engine, engine: Engine, conversations: Sequence[tuple[list[int], int]]) -> Comparison:
    """Run both over the same tokens.

    Raises:
        DataError: there is nothing to compare on.
    """
    if not conversations:
        raise DataError(f"{VALIDATION} is empty: the export would be checked on nothing", "give preprocess.split.validation a larger share")
    same = positions = 0
    largest = 0.0
    for ids, start in progress(conversations, "comparing", len(conversations)):
        agreed, difference = distances(reference.logprobs(ids)[start:-1], engine.logprobs(ids)[start:-1])
        positions += len(agreed)
        same += int(agreed.sum())
        largest = max(largest, difference) if not math.isnan(difference) else math.nan
    return Comparison(probes=len(conversations), positions=positions, agreement=same / positions, max_logit_difference=largest)


def distances(reference: NDArray[np.float32], exported: NDArray[np.float32]) -> tuple[NDArray[np.bool_], float]:
    """Per position whether the most likely token is the same, and the largest difference among the reference's top tokens.

    Args:
        reference: log-probabilities, shape (positions, vocabulary).
        exported: the same; may have more columns (padding of the embedding).
    """
    import numpy as np

    top = np.argsort(-reference, axis=-1, kind="stable")[:, :TOP]
    difference = np.abs(np.take_along_axis(reference, top, axis=-1) - np.take_along_axis(exported, top, axis=-1))
    return reference.argmax(axis=-1) == exported.argmax(axis=-1), float(difference.max())


def hold(found: Comparison, limits: Export) -> None:
    """Stop when the export is too far from what was tuned.

    Raises:
        ModelError: a limit of conf/export/ is broken, or a value is NaN.
    """
    remedy = "choose a finer serve.engine.quantization, or, if the loss is acceptable, another limit in conf/export/"
    if not found.agreement >= limits.min_agreement:
        raise ModelError(
            f"the exported model agrees with the merged one at {found.agreement:.4f} of {found.positions} positions; "
            f"export.min_agreement is {limits.min_agreement}", remedy,
        )  # fmt: skip
    if not found.max_logit_difference <= limits.max_logit_difference:
        raise ModelError(
            f"a log-probability of the exported model differs by {found.max_logit_difference:.4f} nats from the merged one's; "
            f"export.max_logit_difference is {limits.max_logit_difference}", remedy,
        )  # fmt: skip


def probes(limit: int) -> Iterator[Record]:
    """The first validation rows that hold a conversation."""
    return islice((r for r in read_records(VALIDATION) if len(r.messages) > 1 and r.messages[-1]["role"] == "assistant"), limit)


def main() -> None:
    """Merge, convert, check, publish."""
    settings: Export = conf.load("export")
    engine: EngineSettings = conf.load("serve.engine")
    scratch = WORK / "export"
    remove(scratch)
    try:
        parameters = merge(BASE, TUNED, scratch / "merged")
        with publish(OUT) as out:
            cast(scratch / "merged", out / "safetensors", settings.dtype)
            if engine.kind == "ctranslate2":
                to_ctranslate2(scratch / "merged", out / "engine", engine.quantization)
            else:
                shutil.copytree(out / "safetensors", out / "engine")
            log.info("merged %s parameters; %s %s engine of %.0f MB", f"{parameters:,}", engine.kind, engine.quantization, size(out / "engine") / 1e6)
            reference = open_engine(scratch / "merged", EngineSettings(kind="transformers", quantization="float32", threads=engine.threads))
            found = compare(reference, open_engine(out / "engine", engine), [conversation(reference.chat, r) for r in probes(settings.probes)])
            hold(found, settings)
            log.info("the exported model agrees with the merged one at %.1f%% of %d positions", 100 * found.agreement, found.positions)
            summary = {"engine": engine.kind, "quantization": engine.quantization, "dtype": settings.dtype, "parameters": parameters,
                       "bytes": size(out / "engine"), "digest": sha256(out / "engine"), **vars(found)}  # fmt: skip
            write_json(out / "summary.json", summary)
    finally:
        remove(scratch)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


if __name__ == "__main__":
    from stages.run import run

    run(main)
