"""The OpenAI wire format over one engine: chat completions (not streamed), models.

Every parameter is either honoured or refused by name with a 400 in OpenAI's error shape; none is ignored in silence.
`max_tokens` above `serve.max_tokens` is lowered to it, and the answer then says `finish_reason: length`. A message that the
guard refuses is answered with `serve.guard.refusal` and `finish_reason: content_filter`. Every answer carries the digest of
the model that gave it, in `system_fingerprint` and in the header `x-model-digest`.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from conf.errors import ModelError
from conf.schema import Serve
from stages.files import sha256
from stages.serve.engine import Engine, Sampling, open_engine
from stages.serve.guard import Guard

MAX_BODY = 1_000_000
"""Bytes of a request; a longer one is a 413."""
HARMLESS: dict[str, tuple[object, ...]] = {
    "stream": (False,), "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logprobs": (False,), "store": (False,),
    "tools": ([],), "logit_bias": ({},), "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False),
    "stream_options": (), "top_logprobs": (), "tool_choice": ("none", "auto"), "service_tier": ("auto", "default"), "modalities": (["text"],),
}  # fmt: skip
"""Parameters that are not supported, and the values at which they ask for nothing; null is one of them for each."""
WHY = {"stream": "stream: true is not supported yet: ask without it", "n": "one answer per request"}


class Refused(Exception):
    """A request that gets an error of OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Args: status: HTTP status. param: what is wrong, as a dotted path. code: for programs."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """No unknown field, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Turn(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Strict):
    """The supported part of OpenAI's request."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Assistant:
    """A loaded model behind its guard."""

    name: str
    digest: str
    engine: Engine
    guard: Guard
    settings: Serve

    @classmethod
    def load(cls, root: Path) -> Assistant:
        """Load from a folder with `serve.json`, `engine/` and `guard/`, as `package` writes it.

        Raises:
            ModelError: a file is missing, or the engine is not the one that was packaged.
        """
        path = root / "serve.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing", "serve a Bento that `dvc repro package` made")
        facts = json.loads(path.read_text(encoding="utf-8"))
        settings = TypeAdapter(Serve).validate_json(json.dumps(facts["serve"]))
        if (actual := sha256(root / "engine")) != facts["digest"]:
            raise ModelError(f"{root / 'engine'} has digest {actual}, and {facts['digest']} was packaged", "the files were altered: run `dvc repro package`")
        folder = root / "guard"
        guard = Guard(folder if folder.is_dir() else None, settings.guard)
        return cls(name=facts["name"], digest=facts["digest"], engine=open_engine(root / "engine", settings.engine), guard=guard, settings=settings)

    def answer(self, request: ChatRequest) -> dict[str, Any]:
        """Answer one request: blocking, for a thread.

        Raises:
            Refused: the conversation is too long, or the chat template does not take it.
        """
        if not all(self.guard.check(turn.text()).allowed for turn in request.messages if turn.text()):
            return self._body(self.settings.guard.refusal, "content_filter", 0, len(self.engine.chat.encode(self.settings.guard.refusal)))
        messages = [{"role": "system" if t.role == "developer" else t.role, "content": self.engine.chat.defuse(t.text())} for t in request.messages]
        if self.settings.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.settings.system})
        try:
            prompt = self.engine.chat.prompt(messages)
        except ModelError as error:
            raise Refused(400, error.what, "messages", "invalid_value") from error
        if len(prompt) > self.settings.max_prompt_tokens:
            what = f"the conversation has {len(prompt)} tokens; the limit is {self.settings.max_prompt_tokens}"
            raise Refused(400, what, "messages", "context_length_exceeded")
        wanted = request.max_completion_tokens or request.max_tokens or self.settings.max_tokens
        sampling = Sampling(
            max_tokens=min(wanted, self.settings.max_tokens),
            temperature=self.settings.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        )
        completion = self.engine.generate([prompt], sampling)[0]
        return self._body(completion.text, completion.finish_reason, len(prompt), len(completion.tokens))

    def _body(self, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": self.digest,
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens},
        }


def parse(body: bytes, name: str) -> ChatRequest:
    """Read a request's body.

    Args:
        name: of the model that is served.

    Raises:
        Refused: 400 naming the parameter, 404 for another model, 413 for a body over a megabyte.
    """
    if len(body) > MAX_BODY:
        raise Refused(413, f"the request has {len(body)} bytes; the limit is {MAX_BODY}", code="request_too_large")
    try:
        value = json.loads(body)
        body.decode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refused(400, f"the body is a JSON {type(value).__name__}, not an object", code="invalid_json")
    known = {}
    for key, given in value.items():
        if key in ChatRequest.model_fields:
            known[key] = given
        elif key not in HARMLESS:
            raise Refused(400, f"unknown parameter: {key}", key, "unsupported_parameter")
        elif given is not None and given not in HARMLESS[key]:
            raise Refused(400, WHY.get(key, f"{key} is not supported"), key, "unsupported_parameter")
    try:
        request = ChatRequest.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refused(400, f"{where}: {first['msg']}", where, "invalid_value" if first["type"] != "missing" else "missing_required_parameter") from error
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    for where, text in [*((f"messages.{i}.content", t.text()) for i, t in enumerate(request.messages)), *(("stop", s) for s in stops)]:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise Refused(400, f"{where} holds half a surrogate pair, which is no text", where, "invalid_value")
    if request.model != name:
        raise Refused(404, f"the model {request.model!r} does not exist; this service has {name!r}", "model", "model_not_found")
    return request


def create_app() -> FastAPI:
    """The application; `app.state.assistant` must hold the Assistant before the first request."""
    app = FastAPI(title="Trunkline", docs_url=None, redoc_url=None, openapi_url=None)

    def reply(body: dict[str, Any], status: int = 200) -> Response:
        assistant: Assistant = app.state.assistant
        return JSONResponse(body, status, headers={"x-model-digest": assistant.digest})

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return reply(error.body(), error.status)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        assistant: Assistant = app.state.assistant
        parsed = parse(await request.body(), assistant.name)
        return reply(await anyio.to_thread.run_sync(assistant.answer, parsed))

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return reply({"object": "list", "data": [_model(app.state.assistant)]})

    @app.get("/v1/models/{name}", response_model=None)
    async def model(name: str) -> Response:
        assistant: Assistant = app.state.assistant
        if name != assistant.name:
            raise Refused(404, f"the model {name!r} does not exist; this service has {assistant.name!r}", "model", "model_not_found")
        return reply(_model(assistant))

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], response_model=None)
    async def unknown(request: Request) -> Response:
        raise Refused(404, f"there is no {request.method} {request.url.path} here", code="unknown_url")

    return app


def _model(assistant: Assistant) -> dict[str, Any]:
    return {"id": assistant.name, "object": "model", "created": 0, "owned_by": "trunkline", "digest": assistant.digest}
