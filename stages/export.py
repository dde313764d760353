"""Merge, convert and quantise the tuned model for the engine that serves it, and check the result against the merged one.

Reads:  models/select/base, models/tune/adapter or models/tune/model, data/preprocess/validation.jsonl
Writes: models/export/engine (what is evaluated, attacked and served: base, adapter and recipe, or the engine itself, by
        `export.store`), models/export/safetensors (merged, in `export.dtype`, for transformers and vLLM; not beside an adapter),
        models/export/summary.json
Config: export, serve.engine, serve.upstream

With `serve.engine.kind: upstream` there are no weights to export: models/export/engine holds upstream.json, the settings of `serve.upstream`, and
nothing is compared. What select and tune made is left as it is, for the service to go back to.

The check runs both models over the same validation conversations, reference answer included, and compares the distributions
at the positions that the product answers from: after the last token of the prompt, and after each token of the answer.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import conf
from conf.errors import DataError, ModelError
from conf.schema import EngineSettings, Export, Upstream
from stages import platform
from stages.convert import find_recipe, store, to_ctranslate2
from stages.converters import CONVERT
from stages.files import publish, remove, sha256, write_json
from stages.merge import BASE, TUNED, cast, merge, merge_exactly
from stages.records import Record, read_records
from stages.run import WORK, progress
from stages.serve.chat import Chat
from stages.serve.engine import UPSTREAM, Engine, open_engine
from stages.serve.materialise import not_plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


def write_engine(merged: Path, scratch: Path, out: Path, settings: Export, engine: EngineSettings) -> Literal["adapter", "engine"]:
    """Write `out/engine`, and `out/safetensors` where the adapter is not what is stored; says which of them it is.

    A plain LoRA adapter is merged element by element here, so that the engine has the same bytes on every machine; `merged`, which peft
    made, is what it is checked against.
    """
    adapter, source, made = TUNED / "adapter", merged, scratch / "engine"
    if engine.kind in CONVERT:
        reason = "all weights are tuned" if not adapter.is_dir() else not_plain(adapter)
        if reason is None:
            merge_exactly(BASE, adapter, source := scratch / "exact")
        CONVERT[engine.kind](source, made, engine.quantization)
        if settings.store == "adapter":
            if CONVERT[engine.kind] is to_ctranslate2 and reason is None and (recipe := find_recipe(made, BASE, adapter)) is not None:
                store(made, recipe, BASE, adapter, out / "engine")
                return "adapter"
            why = reason or f"no recipe gives a {engine.quantization} engine of this base"
            log.info("export.store=adapter: %s, so the whole engine is stored", why)
        shutil.copytree(made, out / "engine")
    cast(merged, out / "safetensors", settings.dtype)
    if not made.is_dir():
        shutil.copytree(out / "safetensors", out / "engine")
    return "engine"


def name_upstream(upstream: Upstream, out: Path) -> None:
    """Write what is evaluated, attacked and served when somebody else runs the model: its address and its name."""
    write_json(out / "engine" / UPSTREAM, asdict(upstream))
    nothing = dict.fromkeys(("quantization", "dtype", "parameters", "probes", "positions", "agreement", "max_logit_difference"))
    summary = {"engine": "upstream", "store": "upstream", "upstream": {"url": upstream.url, "model": upstream.model}, **nothing, "bytes": size(out / "engine"),
               "digest": sha256(out / "engine"), "platform": platform.record("export", ())}  # fmt: skip
    write_json(out / "summary.json", summary)
    log.info("the model is %s at %s", upstream.model, upstream.url)


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
    if engine.kind == "upstream":
        with publish(OUT) as out:
            name_upstream(conf.load("serve.upstream"), out)
        return
    try:
        parameters = merge(BASE, TUNED, scratch / "merged")
        with publish(OUT) as out:
            stored = write_engine(scratch / "merged", scratch, out, settings, engine)
            log.info("merged %s parameters; %s %s, %s stored: %.0f MB", f"{parameters:,}", engine.kind, engine.quantization, stored, size(out / "engine") / 1e6)
            reference = open_engine(scratch / "merged", EngineSettings(kind="transformers", quantization="float32", threads=engine.threads))
            found = compare(reference, open_engine(out / "engine", engine), [conversation(reference.chat, r) for r in probes(settings.probes)])
            hold(found, settings)
            log.info("the exported model agrees with the merged one at %.1f%% of %d positions", 100 * found.agreement, found.positions)
            made_on = platform.record("export", ("select", "tune"), "torch", *platform.ENGINES[engine.kind])
            summary = {"engine": engine.kind, "quantization": engine.quantization, "dtype": settings.dtype, "store": stored, "parameters": parameters,
                       "bytes": size(out / "engine"), "digest": sha256(out / "engine"), **vars(found), "platform": made_on}  # fmt: skip
            write_json(out / "summary.json", summary)
    finally:
        remove(scratch)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


if __name__ == "__main__":
    from stages.run import run

    run(main)
