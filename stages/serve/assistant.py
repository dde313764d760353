"""A loaded model behind its guard: from a request to answers in the making.

A request that the guard refuses is answered with `serve.guard.refusal`, and the model is not asked. Control tokens that a user wrote out
(`<|im_end|>`) are broken, so that nobody opens a turn of his own, in a plain prompt too.
"""

from __future__ import annotations

import functools
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from conf.errors import ModelError
from conf.schema import SET_ASIDE, Serve
from stages.files import sha256
from stages.serve.engine import Engine, Sampling, open_engine
from stages.serve.grammar import Constraint, Grammars
from stages.serve.guard.guard import SYSTEM, Guard, Message, Screened
from stages.serve.guard.outgoing import Outgoing, Watch
from stages.serve.guard.verdict import Finding
from stages.serve.jobs import Job
from stages.serve.refusals import Refused
from stages.serve.steering import Steering
from stages.serve.text import TextStream
from stages.serve.upstream.letters import Letters
from stages.serve.upstream.masks import strings
from stages.serve.wire import ChatRequest, CompletionRequest, ObjectFormat, SchemaFormat

COLD, NARROW = 1e-4, 1e-6
"""A smaller temperature is 0, and a smaller nucleus this one: what lies below is nothing, or no number, to an engine that computes in float32."""


@dataclass(frozen=True, kw_only=True)
class Assistant:
    """What a Bento holds."""

    name: str
    digest: str
    engine: Engine
    guard: Guard
    settings: Serve

    @classmethod
    def load(cls, root: Path) -> Assistant:
        """Load from a folder with `serve.json`, `engine/` and `guard/`, as `package` writes it.

        Raises:
            ModelError: a file is missing, or engine or guard is not the one that was packaged.
        """
        path = root / "serve.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing", "serve a Bento that `dvc repro package` made")
        facts = json.loads(path.read_text(encoding="utf-8"))
        settings = TypeAdapter(Serve).validate_json(json.dumps(facts["serve"]))
        for folder, packaged in ((root / "engine", facts["digest"]), (root / "guard", facts["guard"])):
            if (actual := sha256(folder) if folder.is_dir() else "none") != packaged:
                raise ModelError(f"{folder} has digest {actual}, and {packaged} was packaged", "the files were altered: run `dvc repro package`")
        guard = Guard(root / "guard", settings.guard)
        engine = open_engine(root / "engine", settings.engine, batches=True)
        return cls(name=facts["name"], digest=facts["digest"], engine=engine, guard=guard, settings=settings)

    def __post_init__(self) -> None:
        self.outgoing  # noqa: B018  what it loads is loaded now, and not by the first request

    @functools.cached_property
    def outgoing(self) -> Outgoing:
        """The guard on answers."""
        return Outgoing(self.settings.guard)

    @functools.cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.engine.chat)

    def kept(self) -> list[int]:
        """The tokens with which every conversation begins that brings no system prompt of its own."""
        return self._kept

    @functools.cached_property
    def _kept(self) -> list[int]:
        one, other = (self.engine.chat.prompt(self._with_system([{"role": "user", "content": text}])) for text in ("a", "b"))
        return one[: _common(one, other)]

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        system = [] if self.settings.system is None or messages[0]["role"] == "system" else [{"role": "system", "content": self.settings.system}]
        return [*system, *messages]

    def screen(self, request: ChatRequest | CompletionRequest, instructs: bool = False) -> Screened:
        """What the guard says of a request.

        Args:
            instructs: whether its sender may write a system prompt (the scope `system` of its key); ours anybody may send.
        """
        if not isinstance(request, ChatRequest):
            return self.guard.screen([Message(text=text) for text in texts(request)])
        found = []
        for turn in request.messages:
            text = turn.text()
            trusted = turn.role in SYSTEM and (instructs or text == self.settings.system)
            found.append(Message(text=text, role=turn.role, name=turn.name, trusted=trusted))
        if not isinstance(self.engine.chat, Letters) or not isinstance(request.response_format, SchemaFormat):
            return self.guard.screen(found)
        schema = "\n".join(strings(request.response_format.json_schema.model_dump(mode="json", by_alias=True)))  # an upstream may show it to its model
        screened = self.guard.screen([*found, Message(text=schema, role="tool")])
        verdict = screened.verdict
        if screened.texts[-1] != schema:
            verdict = replace(verdict, findings=(*verdict.findings, Finding(tier="rules", name="unmaskable", action="refuse")))
        return replace(screened, verdict=verdict, texts=screened.texts[:-1])

    def watch(self, request: ChatRequest | CompletionRequest, screened: Screened) -> Watch:
        """What reads one answer on its way out."""
        ours = self.settings.system if isinstance(request, ChatRequest) and request.messages[0].role not in SYSTEM else None
        return self.outgoing.watch("\n".join(text for text in (ours, screened.system) if text), screened.own)

    def prompts(self, request: ChatRequest | CompletionRequest, shown: Sequence[str]) -> list[list[int]]:
        """The prompts of a request as tokens, one of a conversation. Args: shown: its texts as the model may read them.

        Raises:
            Refused: one is too long, or the chat template does not take it.
        """
        chat = self.engine.chat
        self._check_length(request)
        if isinstance(request, ChatRequest):
            where, named = "messages", {"developer": "system"}
            roles = [named.get(turn.role, turn.role) for turn in request.messages]
            turns = [{"role": role, "content": chat.defuse(text)} for role, text in zip(roles, shown, strict=True)]
            try:
                found = [chat.prompt(self._with_system(turns))]
            except ModelError as error:
                raise Refused(400, error.what, where, "invalid_value") from error
        else:
            where, found = "prompt", [chat.encode(chat.defuse(text)) for text in shown]
        for prompt in found:
            if not prompt:
                raise Refused(400, f"{where} is empty", where, "invalid_value")
            if len(prompt) > self.settings.max_prompt_tokens:
                what = f"{where} has {len(prompt)} tokens; the limit is {self.settings.max_prompt_tokens}"
                raise Refused(400, what, where, "context_length_exceeded")
            self._check_room(prompt, self.sampling(request).max_tokens, where)
        return found

    def _check_room(self, prompt: list[int], most: int, where: str) -> None:
        """Refuse what never fits beside the kept prefix, as far as it does not begin with it, into an engine whose memory is set aside."""
        if self.settings.engine.kind not in SET_ASIDE:
            return
        beside, context = len(self._kept) - _common(self._kept, prompt), self.settings.engine.context
        if len(prompt) + most + beside > context:
            what = f"{where} has {len(prompt)} tokens, and its answer up to {most}; the limit of both is {context - beside}"
            raise Refused(400, what, where, "context_length_exceeded")

    def _check_length(self, request: ChatRequest | CompletionRequest) -> None:
        """Refuse by the number of characters what is too long in any case, before it costs anything."""
        chat, most = isinstance(request, ChatRequest), self.settings.max_prompt_tokens
        lengths = [len(text) for text in texts(request)]
        if (length := sum(lengths) if chat else max(lengths)) > most * self.engine.chat.longest:
            where = "messages" if chat else "prompt"
            what = f"{where} has {length} characters; the limit is {most} tokens, which are {most * self.engine.chat.longest} characters at most"
            raise Refused(400, what, where, "context_length_exceeded")

    def sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        """How the answers are drawn."""
        longest = self.settings.max_tokens
        temperature = self.settings.temperature if request.temperature is None else request.temperature
        wanted = (isinstance(request, ChatRequest) and request.max_completion_tokens) or request.max_tokens or longest
        return Sampling(
            max_tokens=min(wanted, longest),
            temperature=0.0 if temperature < COLD else temperature,
            top_p=1.0 if request.top_p is None else max(request.top_p, NARROW),
            stop=request.stops(),
        )

    def job(self, request: ChatRequest | CompletionRequest, prompt: list[int], index: int, on_text: Callable[[str], None], on_end: Callable[[], None]) -> Job:
        """One answer to make.

        Args:
            index: of the answer among those of the request; it is added to the seed.

        Raises:
            Refused: the JSON schema cannot be followed.
        """
        sampling = self.sampling(request)
        return Job(
            prompt=prompt,
            sampling=sampling,
            text=TextStream(self.engine.chat, sampling.stop),
            on_text=on_text,
            on_end=on_end,
            deadline=time.monotonic() + self.settings.limits.seconds,
            steering=self._steering(request, sampling, index),
        )

    def _steering(self, request: ChatRequest | CompletionRequest, sampling: Sampling, index: int) -> Steering | None:
        """What acts on the logits; null: the engine's own way of drawing gives the same, and faster."""
        constraint, top = self._constraint(request), _told(request)
        frequency, presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0
        seeded = request.seed is not None and sampling.temperature > 0
        if constraint is None and top is None and not frequency and not presence and not seeded:
            return None
        seed = secrets.randbits(62) if request.seed is None else request.seed + index
        return Steering(sampling=sampling, seed=seed % 2**63, frequency_penalty=frequency, presence_penalty=presence, constraint=constraint, top=top)

    def _constraint(self, request: ChatRequest | CompletionRequest) -> Constraint | None:
        wanted = request.response_format if isinstance(request, ChatRequest) else None
        if not isinstance(wanted, ObjectFormat | SchemaFormat):
            return None
        schema = wanted.json_schema.schema_ if isinstance(wanted, SchemaFormat) else {"type": "object"}
        try:
            return self._grammars.compile(schema)
        except ModelError as error:
            raise Refused(400, error.what, "response_format", "invalid_value") from error


def texts(request: ChatRequest | CompletionRequest) -> Sequence[str]:
    """What a user wrote."""
    if isinstance(request, ChatRequest):
        return [turn.text() for turn in request.messages]
    return [request.prompt] if isinstance(request.prompt, str) else request.prompt


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _told(request: ChatRequest | CompletionRequest) -> int | None:
    """How many log-probabilities are told beside a token's own; null: none at all.

    Raises:
        Refused: `top_logprobs` without `logprobs`.
    """
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs is not None and not request.logprobs:
        raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    return (request.top_logprobs or 0) if request.logprobs else None
