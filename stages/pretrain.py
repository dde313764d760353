"""Make a base here: a byte-level BPE tokenizer and Llama weights, trained on the collected corpus and the customers' texts.

Same texts, same settings, same bytes. Not a stage of its own: select calls it for a candidate of kind `made`.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import DataError
from conf.schema import Architecture, Dtype, Made
from stages.records import read_records
from stages.weights import quiet, save

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATA = Path("data/preprocess")
END, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '" + OPEN + "' + message['role'] + '\n' + message['content'] + '" + CLOSE + "' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + OPEN + "assistant\n' }}{% endif %}"
)
"""ChatML, without a default system prompt."""
WARMUP = 0.05
"""Share of the steps."""
SMALLEST = 256 + 3
"""Bytes and control tokens: the vocabulary cannot be smaller."""


def parameters(shape: Architecture) -> int:
    """Parameters of a Llama of this shape whose embedding is also its head; known before anything is trained."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    attention = 2 * shape.hidden * shape.hidden + 2 * shape.hidden * keys
    return shape.vocab * shape.hidden + shape.layers * (attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden) + shape.hidden


def read_texts() -> list[str]:
    """The corpus, then what the customers wrote: no answer is among them, so that tuning has something to teach.

    Raises:
        DataError: there is no text.
    """
    files = [path for path in (DATA / "corpus.jsonl", DATA / "train.jsonl") if path.exists()]
    texts = [record.text for path in files for record in read_records(path) if record.text]
    if not texts:
        raise DataError(f"no text in {DATA}/corpus.jsonl and train.jsonl: there is nothing to pretrain on", "collect a dataset of `use: corpus`")
    return texts


def train_tokenizer(texts: Iterable[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` entries; every text can be written with it.

    Raises:
        DataError: `vocab` has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < SMALLEST:
        raise DataError(f"architecture.vocab={vocab} has no room for 256 bytes and 3 control tokens", f"set it to {SMALLEST} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END, OPEN, CLOSE], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=OPEN, eos_token=CLOSE, pad_token=END, unk_token=END, chat_template=TEMPLATE, model_max_length=context
    )


def blocks(encoded: Sequence[Sequence[int]], end: int, length: int, count: int, seed: int) -> list[list[int]]:
    """`count` sequences of `length` tokens: all texts in a random order, end to end, again and again, cut into pieces.

    Args:
        encoded: Tokens of each text.
        end: Token between two texts.
        length: Tokens in a sequence.
        count: Sequences.
        seed: Of the order; each pass over the texts has another.
    """
    shuffle = random.Random(seed)

    def stream() -> Iterable[int]:
        while True:
            for text in shuffle.sample(encoded, len(encoded)):
                yield from text
                yield end

    tokens = iter(stream())
    return [list(itertools.islice(tokens, length)) for _ in range(count)]


def make(candidate: Made, texts: Sequence[str], dtype: Dtype, out: Path) -> int:
    """Train tokenizer and weights, and write them as a clean folder; returns the number of parameters.

    Raises:
        DataError: the vocabulary is too small.
        ModelError: the training diverged.
    """
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

    shape = candidate.architecture
    tokenizer = train_tokenizer(texts, shape.vocab, shape.context)
    rows = blocks([tokenizer.encode(text) for text in texts], tokenizer.pad_token_id, candidate.sequence, candidate.steps * candidate.batch, candidate.seed)
    set_seed(candidate.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, quiet():
        trainer = Trainer(
            model=model,
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=candidate.steps,
                per_device_train_batch_size=candidate.batch,
                learning_rate=candidate.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=WARMUP,
                weight_decay=0.1,
                bf16=False,
                seed=candidate.seed,
                train_sampling_strategy="sequential",
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=not torch.cuda.is_available(),
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
        return save(model, tokenizer, dtype, out)
