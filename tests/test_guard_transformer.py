"""The optional transformers classifier, with a small one really trained here: windows, classes by name, and what it refuses to open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError, ModelError
from conf.schema import Transformer as Settings
from stages.serve.guard.transformer import Transformer
from tests.guards import ATTACKS, HARMLESS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, a word tokenizer, and some steps on toy texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("classifier")
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.train_from_iterator(ATTACKS + HARMLESS, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False))
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, id2label={0: "SAFE", 1: "INJECTION", 2: "JAILBREAK"},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    hosted = [f"{harmless} {attack} {harmless}" for attack, harmless in zip(ATTACKS, HARMLESS, strict=False)]
    joined = [" ".join(HARMLESS[number : number + 4]) for number in range(len(HARMLESS))]
    batch = tokenizer(ATTACKS + hosted + HARMLESS + joined, padding=True, truncation=True, max_length=64, return_tensors="pt")
    labels = torch.tensor([1 + number % 2 for number in range(len(ATTACKS))] * 2 + [0] * len(HARMLESS + joined))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimiser.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimiser.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def settings(folder: Path, **given: object) -> Settings:
    return Settings(**{"repo": str(folder), "labels": ["INJECTION", "JAILBREAK"], "max_tokens": 24, "threads": 1} | given)  # type: ignore[arg-type]


def test_it_tells_attacks_by_the_named_classes_together(folder: Path) -> None:
    both, one = Transformer(settings(folder)), Transformer(settings(folder, labels=["INJECTION"]))
    assert min(map(both.score, ATTACKS[:4])) > 0.9 > 0.1 > max(map(both.score, HARMLESS[:4]))
    assert 0 < one.score(ATTACKS[0]) < both.score(ATTACKS[0]) <= 1 and both.score("") < 0.9


def test_the_worst_piece_of_a_long_text_counts(folder: Path) -> None:
    reader = Transformer(settings(folder, batch=2))
    hidden = " ".join([*HARMLESS, ATTACKS[0], *HARMLESS])
    pieces = reader.pieces(hidden)
    assert len(pieces) > 10 and max(map(len, pieces)) <= 24
    assert reader.score(hidden) > 0.9 > reader.score(" ".join(HARMLESS * 2))


def test_it_never_reads_more_than_the_model_can(folder: Path) -> None:
    reader = Transformer(settings(folder, max_tokens=4000))
    assert max(map(len, reader.pieces(" ".join(HARMLESS)))) <= 64 and reader.score(" ".join(HARMLESS)) < 1


def test_threads_are_as_before(folder: Path) -> None:
    before = torch.get_num_threads()
    Transformer(settings(folder, threads=before + 1)).score("hello")
    assert torch.get_num_threads() == before


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no class NASTY.*\n*.*SAFE, INJECTION, JAILBREAK"):
        Transformer(settings(folder, labels=["NASTY"]))
    with pytest.raises(ModelError, match="cannot be opened"):
        Transformer(settings(tmp_path))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    torch.save({"evil": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be opened"):
        Transformer(settings(tmp_path))  # a pickle is no way in


def test_a_model_without_a_trained_head_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not name.startswith("classifier")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is no trained classifier: it lacks classifier\.bias"):
        Transformer(settings(tmp_path))


def test_a_hub_model_is_pinned() -> None:
    with pytest.raises(ValueError, match="is on the hub and has no revision"):
        Settings(repo="meta-llama/Prompt-Guard-86M", labels=["JAILBREAK"])
    assert Settings(repo="meta-llama/Prompt-Guard-86M", revision="0" * 40, labels=["JAILBREAK"]).max_tokens == 512


def test_the_module_is_light_until_one_is_opened() -> None:
    code = "import stages.serve.guard.transformer, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
