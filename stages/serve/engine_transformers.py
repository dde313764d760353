"""The reference engine: transformers on torch, which the other two are checked against.

Never imported by the service of a Bento that runs on another engine: torch stays out of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.chat import Chat
from stages.serve.engine import Completion, Sampling, Score
from stages.serve.text import completed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel


class TransformersEngine:
    """A Hugging Face folder with safetensors, on CPU, or on a GPU if torch sees one."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Load the weights in the type of `settings.quantization`.

        Raises:
            ModelError: no safetensors in the folder, or damaged ones, or an integer quantization.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        if settings.quantization not in ("float32", "bfloat16", "float16"):
            raise ModelError(
                f"serve.engine.quantization={settings.quantization} cannot run on the transformers engine", "choose float32, or serve.engine.kind=ctranslate2"
            )
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{folder} holds no *.safetensors", "run `dvc repro export`; pickled weights are not loaded")
        torch.set_num_threads(settings.threads)
        self.chat = Chat(folder)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._settings = settings
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, settings.quantization), use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder} does not load: {' '.join(str(error).split())[:500]}", "remove it and run `dvc repro export`, or `dvc pull`") from error
        self._model = model.to(self._device).eval()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Answer each prompt; batches hold prompts of similar length."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        answers: dict[int, Completion] = {}
        for start in range(0, len(order), self._settings.batch):
            chosen = order[start : start + self._settings.batch]
            decode = functools.partial(self.decode, [prompts[i] for i in chosen], sampling)
            answers.update(zip(chosen, completed(self.chat, len(chosen), sampling, decode), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: Callable[[int, int], bool]) -> None:
        """Left-padded batch, token by token with a KV cache; a prompt that has ended keeps its place in it. The seed is honoured."""
        import torch
        from transformers import DynamicCache

        from stages.serve.sampling import choose

        longest, pad = max(map(len, prompts)), min(self.chat.eos_ids, default=0)
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ended = [False] * len(prompts)
        seed = sampling.seed if sampling.seed is not None else int(torch.seed())
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            for step in range(sampling.max_tokens):
                out = self._model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = out.logits[:, -1].float().cpu().numpy()
                tokens = [choose(row, sampling, seed, step) for row in logits]
                for i, token in enumerate(tokens):
                    ended[i] = ended[i] or on_token(i, token) or token in self.chat.eos_ids
                if all(ended):
                    break
                ids = torch.tensor([[t] for t in tokens], device=self._device)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
                positions = mask.sum(-1, keepdim=True) - 1

    def live(self) -> None:
        """Nobody."""

    def draft(self, prompt: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """One token: the reference engine keeps no state to go on from."""
        last = self.logprobs(prompt)[-1:]
        return [int(last[0].argmax())], last

    def keep(self, prefix: Sequence[int]) -> None:
        """Nothing: the reference engine encodes each prompt whole."""

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[Score]]:
        """Log-likelihood of each continuation; each context is encoded once, its cache is copied for the continuations."""
        return [self._score_one(context, continuations) for context, continuations in requests]

    def _score_one(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        import torch
        from transformers import DynamicCache

        if not context:
            raise ModelError("score got an empty context", "put the end token before the text, as lm-eval does")
        scores: list[Score] = []
        with torch.inference_mode():
            prefix = DynamicCache(config=self._model.config)
            if len(context) > 1:
                self._model(input_ids=torch.tensor([list(context[:-1])], device=self._device), past_key_values=prefix, use_cache=True, logits_to_keep=1)
            for start in range(0, len(continuations), self._settings.batch):
                chunk = [list(c) for c in continuations[start : start + self._settings.batch]]
                longest = max(1, *map(len, chunk))
                ids = torch.tensor([[context[-1], *c[:-1], *[0] * (longest - max(1, len(c)))] for c in chunk], device=self._device)
                cache = copy.deepcopy(prefix)
                if len(context) > 1:
                    cache.batch_repeat_interleave(len(chunk))
                logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits
                for row, c in zip(logits, chunk, strict=True):
                    wanted = torch.tensor(c, dtype=torch.long, device=self._device)
                    logprobs = torch.log_softmax(row[: len(c)].float(), dim=-1)
                    total = float(logprobs.gather(1, wanted[:, None]).double().sum())
                    scores.append(Score(logprob=total, greedy=bool((logprobs.argmax(-1) == wanted).all())))
        return scores

    def logprobs(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities after each token of the prompt: shape (len(prompt), vocabulary)."""
        import numpy as np
        import torch

        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([list(prompt)], device=self._device)).logits[0].float()
            return np.asarray(torch.log_softmax(logits, dim=-1).cpu().numpy(), dtype=np.float32)
