"""The GPU engine: vLLM's `LLM`, on the safetensors of export.

vLLM pins its own torch and transformers, so it lives in an environment of its own (see requirements of vLLM); nothing of it
is imported before an engine is opened. Prefix caching is on. vLLM does not read the prefix cache for prompt log-probabilities,
so `score` forwards each continuation with its context, batched by vLLM's scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.chat import Chat
from stages.serve.engine import Completion, Sampling, Score
from stages.serve.text import cut

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from vllm import RequestOutput, SamplingParams


class VllmEngine:
    """A Hugging Face folder with safetensors, on a GPU."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Load the weights in the type of `settings.quantization`.

        Raises:
            ModelError: vLLM is not installed, no safetensors in the folder, or an integer quantization.
        """
        if settings.quantization not in ("float32", "bfloat16", "float16"):
            raise ModelError(f"serve.engine.quantization={settings.quantization} cannot run on the vllm engine", "choose bfloat16, float16 or float32")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{folder} holds no *.safetensors", "run `dvc repro export`; pickled weights are not loaded")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ModelError("serve.engine.kind=vllm, and vllm is not installed", "install vllm in an environment of its own, or choose ctranslate2") from error
        self.chat = Chat(folder)
        self._llm = LLM(
            model=str(folder),
            dtype=settings.quantization,
            seed=0,
            max_num_seqs=settings.batch,
            enable_prefix_caching=True,
            max_logprobs=-1,
            trust_remote_code=False,
            load_format="safetensors",
        )

    def _run(self, prompts: Sequence[Sequence[int]], parameters: SamplingParams) -> list[RequestOutput]:
        """Outputs in the order of the prompts."""
        outputs: list[RequestOutput] = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters, use_tqdm=False)
        return outputs

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Answer each prompt; prefixes are shared by vLLM's cache."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop) or None,
            stop_token_ids=sorted(self.chat.eos_ids),
        )
        answers = []
        for request in self._run(prompts, parameters):
            output = request.outputs[0]
            tokens = list(output.token_ids)
            if tokens and tokens[-1] in self.chat.eos_ids:
                tokens.pop()
            text, _ = cut(self.chat.decode(tokens), sampling.stop)
            answers.append(Completion(tokens=tokens, text=text, finish_reason="length" if output.finish_reason == "length" else "stop"))
        return answers

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: Callable[[int, int], bool]) -> None:
        """Continue several prompts; the tokens are told at the end: vLLM's offline class does not stream."""
        for index, answer in enumerate(self.generate(prompts, sampling)):
            ended = any(on_token(index, token) for token in answer.tokens)
            if not ended and answer.finish_reason == "stop" and self.chat.eos_ids:
                on_token(index, min(self.chat.eos_ids))

    def live(self) -> None:
        """Nobody."""

    def draft(self, prompt: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """One token, from the log-probabilities after the prompt; what came before is in vLLM's prefix cache."""
        last = self.logprobs(prompt)[-1:]
        return [int(last[0].argmax())], last

    def keep(self, prefix: Sequence[int]) -> None:
        """Nothing: vLLM's prefix cache keeps every prefix."""

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[Score]]:
        """Log-likelihood of each continuation, from the log-probabilities of the prompt."""
        from vllm import SamplingParams

        if not all(len(context) for context, _ in requests):
            raise ModelError("score got an empty context", "put the end token before the text, as lm-eval does")
        flat = [[*context, *continuation] for context, continuations in requests for continuation in continuations]
        outputs = iter(self._run(flat, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)) if flat else [])
        scores: list[list[Score]] = []
        for context, continuations in requests:
            row = []
            for continuation in continuations:
                given = next(outputs).prompt_logprobs or []
                entries = [given[len(context) + j][token] for j, token in enumerate(continuation)]
                row.append(Score(logprob=float(sum(e.logprob for e in entries)), greedy=all(e.rank == 1 for e in entries)))
            scores.append(row)
        return scores

    def logprobs(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities after each token of the prompt: shape (len(prompt), vocabulary)."""
        import numpy as np
        from vllm import SamplingParams

        output = self._run([prompt], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, detokenize=False))[0]
        steps = [*(output.prompt_logprobs or [])[1:], (output.outputs[0].logprobs or [])[0]]
        size = 1 + max(max(step) for step in steps)
        table = np.full((len(steps), size), -np.inf, dtype=np.float32)
        for row, step in zip(table, steps, strict=True):
            for token, entry in step.items():
                row[token] = entry.logprob
        return table
