"""A sequence classifier of the transformers library that reads messages too: Prompt Guard, a DeBERTa, or one of your own.

It costs tens of milliseconds on a CPU, and needs torch and transformers in the service's environment; neither is imported before one is opened.
Weights are safetensors of a pinned commit, and no code of the repository's own is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ConfigError, ModelError
from conf.schema import Transformer as Settings

if TYPE_CHECKING:
    from collections.abc import Sequence


class Transformer:
    """An opened classifier."""

    def __init__(self, settings: Settings) -> None:
        """Args: settings: which one, and which of its classes are attacks.

        Raises:
            ConfigError: the model has no class of that name.
            ModelError: it cannot be had, or is no classifier in safetensors.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.settings = settings
        local = settings.revision is None
        where = str(Path(settings.repo).resolve()) if local else settings.repo
        given = {"revision": None if local else settings.revision, "trust_remote_code": False, "local_files_only": local}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(where, **given)
            self.model, found = AutoModelForSequenceClassification.from_pretrained(
                where, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **given
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            remedy = "check serve.guard.transformer.repo and revision, and that it is a sequence classifier with model.safetensors; HF_TOKEN for a closed one"
            raise ModelError(f"serve.guard.transformer {settings.repo} cannot be opened: {' '.join(str(error).split())[:300]}", remedy) from error
        if found["missing_keys"]:
            what = f"serve.guard.transformer {settings.repo} is no trained classifier: it lacks {', '.join(sorted(found['missing_keys'])[:4])}"
            raise ModelError(what, "name a model that was trained to classify sequences")
        if not self.tokenizer.is_fast:
            raise ModelError(f"serve.guard.transformer {settings.repo} has no tokenizer.json", "name a model with a fast tokenizer")
        names: dict[int, str] = self.model.config.id2label
        if stray := sorted(set(settings.labels) - set(names.values())):
            what = f"serve.guard.transformer.labels: {settings.repo} has no class {', '.join(stray)}"
            raise ConfigError(what, f"its classes are {', '.join(map(str, names.values()))}")
        self.hostile = [number for number, name in names.items() if name in settings.labels]
        self.model.eval()

    def score(self, text: str) -> float:
        """The worst piece's probability of being an attack, 0 to 1; `text` as it came."""
        import torch

        pieces = self.pieces(text)
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads)
        try:
            found = [self.hostility(pieces[start : start + self.settings.batch]) for start in range(0, len(pieces), self.settings.batch)]
        finally:
            torch.set_num_threads(before)
        return max(found)

    def pieces(self, text: str) -> list[list[int]]:
        """Token ids of pieces that overlap by half and cover the text, each with the model's special tokens."""
        own = self.tokenizer.num_special_tokens_to_add()
        longest = min(self.settings.max_tokens, getattr(self.model.config, "max_position_embeddings", self.settings.max_tokens))
        size = max(longest - own, 2)
        found = self.tokenizer(text, truncation=True, max_length=size + own, stride=size // 2, return_overflowing_tokens=True)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def hostility(self, pieces: Sequence[list[int]]) -> float:
        """The largest probability of a batch's pieces."""
        import torch

        batch = self.tokenizer.pad({"input_ids": list(pieces)}, return_tensors="pt")
        with torch.inference_mode():
            chances = self.model(**batch).logits.softmax(-1)
        return float(chances[:, self.hostile].sum(-1).max())
