"""TRL's SFT trainer with what a CPU and a resumable run need: logits only where there is a loss, an order fixed in advance, whole checkpoints.

Heavy: it imports torch and trl, so stages import it inside functions.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from conf.errors import DataError
from conf.schema import Dtype, Lora, Tune
from stages.files import is_sealed, remove, seal
from stages.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Turns = Mapping[str, Sequence[Message]]
"""`prompt` and `completion`."""

WINDOW = 16
"""Steps whose rows are sorted by length together: enough to save padding, few enough to keep the order random."""

log = logging.getLogger(__name__)


def order(lengths: list[int], per_step: int, steps: int, seed: int, group: bool) -> list[int]:
    """The rows of a whole run, in order: passes over all rows, each shuffled anew, cut to `steps` times `per_step`.

    Args:
        lengths: Tokens of each row.
        per_step: Rows in an optimiser step.
        steps: Optimiser steps.
        seed: Of the shuffles.
        group: Put rows of similar length into a step; the steps stay in random order.
    """
    shuffle = random.Random(seed)
    rows: list[int] = []
    while len(rows) < steps * per_step:
        rows += shuffle.sample(range(len(lengths)), len(lengths))
    del rows[steps * per_step :]
    if not group:
        return rows
    grouped: list[int] = []
    for start in range(0, len(rows), WINDOW * per_step):
        window = sorted(rows[start : start + WINDOW * per_step], key=lambda row: (lengths[row], row))
        batches = [window[i : i + per_step] for i in range(0, len(window), per_step)]
        shuffle.shuffle(batches)
        grouped += [row for batch in batches for row in batch]
    return grouped


class Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers has none here
    """Mark a checkpoint as whole once everything in it is written, and tell how the run goes."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log before a checkpoint: the trainer keeps the losses since its last line in memory only, and a resumed run would not have them."""
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal it."""
        seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """One line per point of a curve."""
        for key, what in (("loss", "loss"), ("eval_loss", "validation loss")):
            if logs and key in logs:
                log.info("step %d of %d: %s %.4f", state.global_step, state.max_steps, what, logs[key])


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is still what was written; others are removed."""
    found = {int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        if is_sealed(found[step]):
            return found[step]
        remove(found[step])
    return None


class Trainer(SFTTrainer):  # type: ignore[misc]  # trl has no types
    """SFTTrainer that projects only the completion's positions onto the vocabulary.

    On CPU, TRL 1.16 projects every position (and takes its entropy): of a row of 100 tokens, of which 30 are the completion, that is
    70 rows of the largest matrix for nothing, three times. The loss is the same to rounding; a test compares them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As SFTTrainer; without its progress bar."""
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ) -> Any:
        """Mean negative log-likelihood of the labelled tokens of a batch, in nats."""
        if self.args.device.type != "cpu" or self.accelerator.num_processes > 1 or return_outputs or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        plain: PreTrainedModel = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        labels = inputs["labels"][:, 1:]
        labelled = labels != -100
        # rows are padded on the right, where a causal model never looks: without a mask, attention takes its fast path
        where = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
        with self.accelerator.autocast():
            hidden = plain.base_model(input_ids=inputs["input_ids"], use_cache=False, **where).last_hidden_state[:, :-1][labelled]
            logits = plain.get_output_embeddings()(hidden).float()
        targets = labels[labelled]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        mode = "train" if self.model.training else "eval"
        if len(targets):
            self._metrics[mode]["mean_token_accuracy"].append((logits.detach().argmax(-1) == targets).float().mean().item())
        return loss / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch)


def arguments(settings: Tune, folder: Path, evaluate: bool) -> SFTConfig:
    """The settings in TRL's terms. With early stopping, a checkpoint goes with each evaluation, and the best one is the result."""
    stops = settings.early_stopping is not None
    return SFTConfig(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        max_length=settings.max_length,
        packing=settings.packing,
        completion_only_loss=settings.completion_only,
        seed=settings.seed,
        data_seed=settings.seed,
        train_sampling_strategy="sequential",
        logging_steps=settings.log_every,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.evaluate_every if stops else settings.checkpoint_every,
        save_total_limit=2,
        load_best_model_at_end=stops,
        metric_for_best_model="eval_loss" if stops else None,
        greater_is_better=False if stops else None,
        restore_callback_states_from_checkpoint=stops,
    )


def build(settings: Tune, base: Path, train: Sequence[Turns], validation: Sequence[Turns], folder: Path) -> Trainer:
    """A trainer on the base, with the rows in the order in which they will be seen.

    Args:
        settings: How to tune.
        base: Folder of the base.
        train, validation: Conversations in TRL's prompt/completion form.
        folder: Where checkpoints go.

    Raises:
        DataError: nothing is left to learn from.
    """
    torch.set_num_threads(settings.threads)
    settings = replace(settings, precision=usable(settings.precision))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False)
    if settings.lora:
        freeze(model, getattr(torch, settings.precision))
    stop = settings.early_stopping
    trainer = Trainer(
        model=model,
        args=arguments(settings, folder, bool(validation)),
        processing_class=AutoTokenizer.from_pretrained(base, local_files_only=True),
        train_dataset=Dataset.from_list(list(train)),
        eval_dataset=Dataset.from_list(list(validation)) if validation else None,
        peft_config=adapter(model, settings.lora) if settings.lora else None,
        callbacks=[Checkpoints(), *([EarlyStoppingCallback(stop.patience, stop.threshold)] if stop else [])],
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    if not lengths:
        raise DataError(
            f"no training row has an answer within tune.max_length={settings.max_length} tokens", "raise it, or look at data/preprocess/train.jsonl"
        )
    per_step = settings.batch * settings.accumulate
    steps = settings.steps or max(1, math.ceil((settings.epochs or 0) * len(lengths) / per_step))
    trainer.train_dataset = trainer.train_dataset.select(order(lengths, per_step, steps, settings.seed, settings.group_by_length))
    trainer.args.max_steps = steps
    return trainer


def usable(precision: Dtype) -> Dtype:
    """The precision, or float32 where the CPU has no instructions for it: without them bfloat16 is five times slower, not twice as fast.

    One matrix product of SmolLM2-135M on one thread, in ms: float32 16; bfloat16 8 with avx512_bf16, 37 with avx512 alone, 74 with avx2.
    """
    if precision == "float32" or torch.cuda.is_available():
        return precision
    has = torch.cpu.get_capabilities()
    if precision == "bfloat16" and any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return precision
    log.warning("tune.precision=%s: this CPU has no instructions for it, so float32 is used", precision)
    return "float32"


def freeze(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the frozen matrices in the type in which they are multiplied; the adapter, norms and residual stream stay in float32.

    SmolLM2-135M, adapter on 10 blocks, 8 x 96 tokens, one thread with avx512_bf16, seconds a step: float32 4.0, all in bfloat16 3.8,
    float32 cast on the way 2.4, this 2.3.
    """
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


def adapter(model: PreTrainedModel, lora: Lora) -> LoraConfig:
    """The adapter in peft's terms."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        layers_to_transform=blocks(model, lora.layers),
    )


def blocks(model: PreTrainedModel, last: int | None) -> list[int] | None:
    """Indices of the last so many transformer blocks; null: all."""
    total = model.config.get_text_config().num_hidden_layers
    return None if last is None or last >= total else list(range(total - last, total))
