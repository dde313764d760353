"""pretrain: a base made here is reproducible, learns, can write any text, and has the size that the limits were told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from conf.schema import Architecture, Made
from stages.files import sha256
from stages.pretrain import SMALLEST, blocks, make, parameters, read_texts, train_tokenizer

TEXTS = ["Where is my order 4711?", "I want my money back, please.", "The tent is torn and one pole is missing.", "How do I return the boots?"] * 5
SMALL = Architecture(vocab=320, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, context=64)


def candidate(steps: int, seed: int = 0) -> Made:
    """A tiny model."""
    return Made(kind="made", licence="LicenseRef-Made", architecture=SMALL, steps=steps, batch=4, sequence=16, seed=seed)


def test_same_texts_same_bytes_and_another_seed_another_model(tmp_path: Path) -> None:
    counted = make(candidate(3), TEXTS, "float32", tmp_path / "one")
    make(candidate(3), TEXTS, "float32", tmp_path / "two")
    make(candidate(3, seed=1), TEXTS, "float32", tmp_path / "three")
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")
    assert sha256(tmp_path / "one/model.safetensors") != sha256(tmp_path / "three/model.safetensors")
    assert counted == parameters(SMALL)
    assert json.loads((tmp_path / "one/config.json").read_text())["tie_word_embeddings"] is True


def test_it_learns(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = []
    for steps in (1, 60):
        make(candidate(steps), TEXTS, "float32", tmp_path / str(steps))
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / str(steps)), AutoTokenizer.from_pretrained(tmp_path / str(steps))
        ids = torch.tensor([tokenizer.encode(TEXTS[0])])
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[1] < losses[0] / 2


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    if any(token in text for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")):
        return
    tokenizer = train_tokenizer(TEXTS, 320, 64)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=9), min_size=1, max_size=9), st.integers(1, 8), st.integers(1, 20))
def test_blocks_are_full_and_made_of_whole_texts(encoded: list[list[int]], length: int, count: int) -> None:
    pieces = blocks(encoded, 0, length, count, seed=0)
    assert len(pieces) == count and all(len(piece) == length for piece in pieces)
    stream = [token for piece in pieces for token in piece]
    whole = " ".join(map(str, stream)).split(" 0 ")[:-1]
    assert set(whole) <= {" ".join(map(str, text)) for text in encoded}


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=f"vocab={SMALLEST - 1} has no room"):
        train_tokenizer(TEXTS, SMALLEST - 1, 64)


def test_nothing_to_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="nothing to pretrain on"):
        read_texts()


def test_the_chat_template_is_chatml(tmp_path: Path) -> None:
    from stages.serve.chat import Chat

    train_tokenizer(TEXTS, 320, 64).save_pretrained(tmp_path)
    chat = Chat(tmp_path)
    assert chat.render([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.eos_ids == {2}
