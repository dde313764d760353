"""The one interface through which every model is asked, in evaluate, redteam and production.

A prompt is a list of token ids. `generate` and `score` keep the order of what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.chat import Chat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


UPSTREAM = "upstream.json"
"""File in an engine's folder that names a model which somebody else runs."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to generate."""

    max_tokens: int
    """Most tokens to generate."""
    temperature: float = 0.0
    """0: always the most likely token."""
    top_p: float = 1.0
    """Nucleus: smallest set of tokens with this share of the probability."""
    seed: int | None = None
    """Of the sampling; null: any."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer."""

    tokens: list[int]
    """Generated ids, without the end token."""
    text: str
    """Decoded, cut before the first stop text."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the end token or a stop text; `length`: max_tokens."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely one continuation is."""

    logprob: float
    """Sum over its tokens, natural logarithm."""
    greedy: bool
    """Whether each of its tokens was the most likely one."""


class LiveBatch(Protocol):
    """Answers at work, of which each comes and goes at any step. For one thread."""

    def join(self, prompt: Sequence[int], most: int) -> int | None:
        """Take in a prompt and an answer of at most `most` tokens; gives the number of its place, or null: there is no room at the moment."""
        ...

    def step(self) -> dict[int, NDArray[np.float32]]:
        """Encode on; place -> logits after all of its tokens, of those that are encoded whole: shape (vocabulary,), valid until the next call."""
        ...

    def push(self, place: int, token: int) -> None:
        """Go on from this token in the next step."""
        ...

    def leave(self, place: int) -> None:
        """End an answer; its place is free."""
        ...


class Engine(Protocol):
    """What runs a model."""

    chat: Chat
    """Tokenizer and chat template of the model."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Answer each prompt; shared prefixes are encoded once where the engine can."""
        ...

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: Callable[[int, int], bool]) -> None:
        """Continue several prompts side by side, as one batch, and tell each token as it comes.

        Args:
            sampling: of all of them; its seed and its stop texts are not used.
            on_token: gets the number of the prompt and a token, end tokens included; returning true ends that prompt.
        """
        ...

    def live(self) -> LiveBatch | None:
        """A batch of its own that begins with the kept prefix, for `stages.serve.scheduler`; null: this engine takes nobody into a running batch."""
        ...

    def draft(self, prompt: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """The most likely continuation, at least one and at most `count` tokens, and the logits that each was taken from: shape (tokens, vocabulary)."""
        ...

    def keep(self, prefix: Sequence[int]) -> None:
        """Keep the encoded state of the one beginning that most prompts of `decode` share, where the engine can."""
        ...

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[Score]]:
        """For each (context, continuations): the log-likelihood of each continuation; the context is encoded once."""
        ...

    def logprobs(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities over the whole vocabulary after each token of the prompt: shape (len(prompt), vocabulary)."""
        ...


def open_engine(folder: Path, settings: EngineSettings, *, batches: bool = False) -> Engine:
    """Load an exported model with the engine that `conf/serve/` names.

    Args:
        folder: The model.
        settings: What runs it.
        batches: Many prompts will come at a time, as in evaluate and the service; false: one by one. The answers are the same.

    Raises:
        ModelError: the folder is incomplete, or the engine is not installed.
    """
    match settings.kind:
        case "ctranslate2":
            from stages.serve.engine_ctranslate2 import CTranslate2Engine

            return CTranslate2Engine(folder, settings, batches)
        case "openvino":
            from stages.serve.engine_openvino import OpenVinoEngine

            return OpenVinoEngine(folder, settings)
        case "llamacpp":
            from stages.serve.engine_llamacpp import LlamaCppEngine

            return LlamaCppEngine(folder, settings)
        case "transformers":
            from stages.serve.engine_transformers import TransformersEngine

            return TransformersEngine(folder, settings)
        case "vllm":
            from stages.serve.engine_vllm import VllmEngine

            return VllmEngine(folder, settings)
        case "upstream":
            from stages.serve.upstream.engine import UpstreamEngine

            return UpstreamEngine(folder, settings)
    raise ModelError(f"serve.engine.kind={settings.kind} is unknown", "choose openvino, ctranslate2, llamacpp, transformers, vllm or upstream")
