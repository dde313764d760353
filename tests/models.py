"""Small models for the tests: a random Llama with a byte-level BPE tokenizer trained on the spot."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["where is my order", "cancel my order please", "refund status of the order", "which size is the tent", "user assistant system hello you"]


def tiny_llama(folder: Path, seed: int = 0, template: str = TEMPLATE, dtype: str = "float32", tied: bool = False, digits: bool = False) -> Path:
    """Write a Hugging Face folder: two blocks of width 32, sharp enough that greedy answers are not one token repeated.

    `tied`: the embedding is also the head. `digits`: the tokenizer splits them one by one, as SmolLM2's does.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, initializer_range=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


if __name__ == "__main__":  # for tests that leave torch to another process
    tiny_llama(Path("hf"))
