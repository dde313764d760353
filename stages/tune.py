"""Tune the base on the training conversations with TRL: all weights, or a LoRA adapter.

Reads: models/select/base/; data/preprocess/train.jsonl and validation.jsonl (their `messages`).
Writes: models/tune/adapter/ or models/tune/model/, models/tune/plots/ (DVCLive), models/tune/summary.json.
Config: tune.

A killed run goes on from its last checkpoint (.dvc/tmp/trunkline/tune/<digest of the inputs>/) and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import conf
from conf.errors import DataError, ModelError
from conf.schema import Dtype, Tune
from stages import platform
from stages.files import canonical, publish, read_json, remove, sha256, write_json
from stages.records import Message, Record, read_records
from stages.run import WORK
from stages.serve.chat import Chat

if TYPE_CHECKING:
    from stages.training import Trainer

BASE = Path("models/select/base")
DATA = Path("data/preprocess")
OUT = Path("models/tune")
SCRATCH = WORK / "tune"
CODE = ("tune.py", "training.py", "weights.py", "serve/chat.py")
CURVES = {
    "loss": "train/loss",
    "mean_token_accuracy": "train/token_accuracy",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/gradient_norm",
    "eval_loss": "validation/loss",
    "eval_mean_token_accuracy": "validation/token_accuracy",
}
"""The trainer's name of a curve -> its file in models/tune/plots/metrics/."""

log = logging.getLogger(__name__)


def split_turns(record: Record, chat: Chat) -> dict[str, list[Message]]:
    """A record in TRL's prompt/completion form; control tokens that a customer wrote out are broken, as the service does.

    Raises:
        DataError: the conversation does not end with an answer.
    """
    if len(record.messages) < 2 or record.messages[-1]["role"] != "assistant":
        raise DataError(f"{record.source} {record.id}: no conversation that ends with an answer", "mend preprocess.chat, and run `dvc repro`")
    turns = [Message(role=m["role"], content=chat.defuse(m["content"]) if m["role"] == "user" else m["content"]) for m in record.messages]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def count_cut(records: Iterable[Record], chat: Chat, longest: int) -> int:
    """How many conversations have more tokens than `longest`."""
    return sum(len(chat.encode(chat.render(record.messages, add_generation_prompt=False))) > longest for record in records)


def digest(settings: Tune) -> str:
    """What the result depends on: settings, rows, base, code and libraries."""
    here = Path(__file__).parent
    parts = {
        "settings": asdict(settings),
        "files": {path.as_posix(): sha256(path) for path in (BASE, DATA / "train.jsonl", DATA / "validation.jsonl")},
        "code": {name: sha256(here / name) for name in CODE},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def save_adapter(trainer: Trainer, folder: Path, dtype: Dtype) -> None:
    """Write the adapter alone, in the type in which it is kept, without a path of this machine.

    SmolLM2-135M after 160 steps, merged, bfloat16 against float32: the same most likely token at 289 of 289 positions, and at most 0.009
    nats apart; the int8 engine is 3.3 nats from the merged model.

    Raises:
        ModelError: a weight is not finite: the run diverged.
    """
    import torch

    tuned = {name: weight.to(getattr(torch, dtype)) for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    broken = [name for name, weight in tuned.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ModelError(f"{len(broken)} tuned tensors hold NaN or infinite numbers, such as {broken[0]}", "lower tune.learning_rate")
    trainer.model.save_pretrained(folder, state_dict=tuned)
    remove(folder / "README.md")
    config = read_json(folder / "adapter_config.json")
    config.update(base_model_name_or_path=BASE.as_posix(), target_modules=sorted(config["target_modules"]))
    write_json(folder / "adapter_config.json", config)
    (folder / "adapter_model.safetensors").chmod(0o644)


def draw(history: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write the curves with DVCLive, one TSV each, from the trainer's own history, which a resumed run continues.

    Raises:
        DataError: the repository has no commit, without which DVCLive does not start.
    """
    from dvclive import Live
    from scmrepo.exceptions import SCMError

    try:
        live = Live(str(folder), dvcyaml=None, report=None, save_dvc_exp=False)
    except SCMError as error:
        raise DataError(f"DVCLive cannot draw the training curves here: {error}", "commit first: `git add -A && git commit`") from error
    with live:
        for point in history:
            live.step = int(point["step"])
            for key, name in CURVES.items():
                if key in point:
                    live.log_metric(name, float(point[key]))


def summarise(trainer: Trainer, rows: int, cut: int) -> dict[str, object]:
    """What the run did; no durations, which vary. `best_step` and `validation_loss` are the result's, where early stopping went back to it."""
    history = trainer.state.log_history
    seen = trainer.state.global_step * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    last = next((point["eval_loss"] for point in reversed(history) if "eval_loss" in point), None)
    return {
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "rows": rows,
        "rows_cut": cut,
        "tokens": sum(map(len, trainer.train_dataset["input_ids"][:seen])),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "train_loss": next((point["loss"] for point in reversed(history) if "loss" in point), None),
        "validation_loss": trainer.state.best_metric if trainer.args.load_best_model_at_end else last,
    }


def main() -> None:
    """Read, train or go on training, publish."""
    settings: Tune = conf.load("tune")
    chat = Chat(BASE)
    train = list(read_records(DATA / "train.jsonl"))
    validation = list(read_records(DATA / "validation.jsonl"))[: settings.validation_rows]
    if not train:
        raise DataError(f"{DATA / 'train.jsonl'} has no rows", "look at data/preprocess/dropped.jsonl for where they went")
    from stages.training import build, last_whole
    from stages.weights import quiet, save

    made_on = platform.record("tune", ("select",), "torch")
    folder = SCRATCH / digest(settings)
    with quiet():
        trainer = build(settings, BASE, [split_turns(r, chat) for r in train], [split_turns(r, chat) for r in validation], folder)
        draw([], folder / "live")  # what keeps DVCLive from starting stops here, before anything is trained
        checkpoint = last_whole(folder)
        if checkpoint:
            log.info("going on from %s", checkpoint.name)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if settings.lora:
            with publish(OUT / "adapter") as out:
                save_adapter(trainer, out, settings.lora.dtype)
            remove(OUT / "model")
        else:
            with publish(OUT / "model") as out:
                save(trainer.model, trainer.processing_class, "float32", out)
            remove(OUT / "adapter")
    with publish(OUT / "plots") as out:
        draw(trainer.state.log_history, folder / "live")
        shutil.move(folder / "live" / "plots", out)  # models/ may be another disk
    cut = count_cut(train, chat, settings.max_length)
    write_json(OUT / "summary.json", summarise(trainer, len(train), cut) | {"platform": made_on})
    remove(SCRATCH)  # with what killed runs of other settings left


if __name__ == "__main__":
    from stages.run import run

    run(main)
