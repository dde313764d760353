"""lm-eval on the engine interface: what select's probe and evaluate measure with.

Requests with the same context are scored together, so that the engine encodes the context once; a request seen before
(another task, another metric) is answered from memory. Batches are cut the same way in every run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from conf.errors import DataError, ModelError
from stages.results import Result, read_result
from stages.run import progress
from stages.serve.engine import Engine, Sampling, Score
from stages.tasks import load_tasks

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

CHUNK = 256
"""Requests handed to the engine at a time; it cuts them into its own batches."""
WINDOW = 1024
"""Tokens of context for the log-likelihood of a whole text."""


class EngineLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """lm-eval's model class on an Engine."""

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        """Args: engine: the model. max_tokens: longest answer, unless the task asks for a shorter one."""
        super().__init__()
        self.engine, self.max_tokens = engine, max_tokens
        self._answers: dict[tuple[tuple[int, ...], Sampling], str] = {}
        self._scores: dict[tuple[tuple[int, ...], tuple[int, ...]], Score] = {}

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's request cache key, which is not used: the engine has a cache of its own."""
        return "engine"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the service renders it; control tokens that a user wrote out are broken, as there."""
        safe = [{**m, "content": self.engine.chat.defuse(m["content"])} if m["role"] == "user" else m for m in chat_history]
        return self.engine.chat.render(safe, add_generation_prompt=add_generation_prompt)

    def prefix(self) -> int:
        """The token that stands where there is no context."""
        if not self.engine.chat.eos_ids:
            raise ModelError("the tokenizer names no end token", "set eos_token in tokenizer_config.json")
        return min(self.engine.chat.eos_ids)

    def encode_pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of both, split as lm-eval's own HFLM does: blanks move to the continuation, the whole is encoded, then cut."""
        encode = self.engine.chat.encode
        blanks = context[len(context.rstrip()) :]
        context, continuation = context.rstrip(), blanks + continuation
        if not context:
            return (self.prefix(),), tuple(encode(continuation))
        head = encode(context)
        return tuple(head), tuple(encode(context + continuation)[len(head) :]) or tuple(encode(continuation))

    def _score(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Score]:
        contexts: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, continuation in pairs:
            if (context, continuation) not in self._scores:
                contexts.setdefault(context, {})[continuation] = None
        ordered = sorted(contexts, key=lambda c: (-len(c), c))
        for start in progress(range(0, len(ordered), CHUNK), "scoring"):
            chunk = ordered[start : start + CHUNK]
            for context, scores in zip(chunk, self.engine.score([(c, list(contexts[c])) for c in chunk]), strict=True):
                self._scores.update({(context, continuation): s for continuation, s in zip(contexts[context], scores, strict=True)})
        return [self._scores[pair] for pair in pairs]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it."""
        scores = self._score([self.encode_pair(*request.args) for request in requests])
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text, in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = [
            [make_disjoint_window(w) for w in get_rolling_token_windows(self.engine.chat.encode(request.args[0]), self.prefix(), WINDOW, 1)]
            for request in requests
        ]
        scores = iter(self._score([(tuple(context), tuple(rest)) for text in windows for context, rest in text]))
        return [sum(next(scores).logprob for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each prompt, cut before the first of the task's stop texts."""
        keys = [(tuple(self.engine.chat.encode(request.args[0])), self.sampling(request.args[1])) for request in requests]
        for sampling in dict.fromkeys(s for _, s in keys):
            prompts = sorted({p for p, s in keys if s == sampling and (p, s) not in self._answers}, key=lambda p: (-len(p), p))
            for start in progress(range(0, len(prompts), CHUNK), "answering"):
                chunk = prompts[start : start + CHUNK]
                for prompt, completion in zip(chunk, self.engine.generate(chunk, sampling), strict=True):
                    self._answers[prompt, sampling] = completion.text
        return [self._answers[key] for key in keys]

    def sampling(self, arguments: Mapping[str, Any]) -> Sampling:
        """lm-eval's generation arguments in the engine's terms."""
        until = arguments.get("until") or []
        asked = arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or self.max_tokens
        sampled = arguments.get("do_sample", arguments.get("temperature", 0) > 0)
        return Sampling(
            max_tokens=min(asked, self.max_tokens),
            stop=tuple([until] if isinstance(until, str) else until),
            temperature=float(arguments.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(arguments.get("top_p", 1.0)),
            seed=0,
        )


def run_tasks(
    model: EngineLM,
    names: list[str],
    metric: str,
    key: str,
    *,
    system: str | None = None,
    chat: bool = True,
    fewshot: int = 0,
    limit: int | None = None,
    seed: int = 0,
    bootstrap: int = 0,
    higher_is_better: bool = True,
) -> dict[str, Result]:
    """Ask every question of some lm-eval tasks.

    Args:
        model: What answers.
        names: lm-eval tasks.
        metric: One that each of them has: `name`, or `name,filter`.
        key: Dotted key that names the tasks, for messages.
        system, chat, fewshot, limit, higher_is_better: As in `conf.schema.Task`.
        seed: Of the few-shot examples.
        bootstrap: Resamples for the standard error of a metric that is no mean.

    Raises:
        ConfigError, DataError, SourceError: as `load_tasks` does; or a task has no such metric.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.evaluator import evaluate

    tasks = load_tasks(names, key, fewshot, seed)
    found: Any = evaluate(
        model,
        {"tasks": tasks},
        limit=limit,
        bootstrap_iters=bootstrap,
        log_samples=True,
        system_instruction=system,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
    )
    return {name: read_result(task, metric, found["results"][name], found["samples"][name], key, higher_is_better) for name, task in tasks.items()}


def probe(engine: Engine, task: str, metric: str, limit: int) -> tuple[float, float]:
    """Score and standard error of a model on the first rows of a task, for select.

    Raises:
        DataError: fewer than two rows.
        ModelError: the score is no number.
    """
    result = run_tasks(EngineLM(engine, 64), [task], metric, "select.probe.task", limit=limit)[task]
    if result.n < 2:
        raise DataError(f"select.probe: {task} has {result.n} row: that says nothing", "raise select.probe.limit")
    if result.score is None or result.stderr is None:
        raise ModelError(f"select.probe: {task} gave no {metric}: {result.reason}", "the weights are broken, or the metric has no standard error")
    return result.score, result.stderr
