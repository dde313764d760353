"""The OpenAI wire format: what may be asked and what comes back. The OpenAPI document is made from these types.

Every parameter of OpenAI's API is either honoured or refused by name; none is ignored in silence. One that is not supported may be given
at the values at which it asks for nothing (`tools: []`), because some clients always send it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

UNSUPPORTED = {
    "tools": "", "tool_choice": "", "functions": "", "function_call": "", "parallel_tool_calls": "", "logit_bias": "", "store": "", "service_tier": "",
    "modalities": "", "audio": "", "prediction": "", "web_search_options": "", "reasoning_effort": "", "verbosity": "", "suffix": "",
    "echo": "", "best_of": ": ask for n answers and choose",
}  # fmt: skip
"""Parameter -> what its refusal adds."""
DEEPEST = 64
"""Objects and lists within each other, of a schema."""
MOST_ANSWERS = 8
"""Of one request."""


def _whole(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("it holds half a surrogate pair, which is no text")
    if "\0" in text:
        raise ValueError("it holds a NUL, which no database takes for text")
    return text


def _plain(value: Any, depth: int = 0) -> Any:
    """A JSON value without half characters and numbers that JSON has not, and not nested without end."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    match value:
        case str():
            _whole(value)
        case float() if not math.isfinite(value):
            raise ValueError(f"{value} is no number of JSON")
        case list():
            for item in value:
                _plain(item, depth + 1)
        case dict():
            for name, item in value.items():
                _plain(name)
                _plain(item, depth + 1)
    return value


Text = Annotated[str, AfterValidator(_whole)]


class Strict(BaseModel):
    """No unknown field, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Turn(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = False
    """A last chunk without choices says how many tokens it was."""
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    """A schema by OpenAI's rules."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, object], AfterValidator(_plain), Field(alias="schema")]
    """What llguidance knows of JSON Schema."""
    description: Text | None = None
    strict: bool | None = None
    """Followed in either case."""


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Some JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=4)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Empty = Annotated[list[object], Field(max_length=0)]
NoBias = Annotated[dict[str, object], Field(max_length=0)]


class Asked(Strict):
    """What chat completions and completions have in common."""

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Above `serve.max_tokens` it is lowered to that, and the answer may then end with `length`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    user: Annotated[Text, Field(max_length=512)] | None = None
    logit_bias: NoBias | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Goes before `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    metadata: dict[Text, Text] | None = None
    store: Literal[False] | None = None
    tools: Empty | None = None
    functions: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_ANSWERS)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class FeedbackRequest(Strict):
    """`POST /v1/feedback`."""

    id: Annotated[str, Field(pattern=r"^(chatcmpl|cmpl)-[0-9a-f]{32}$")]
    """Of the answer."""
    rating: Literal["up", "down"]
    comment: Annotated[Text, Field(max_length=4000)] | None = None
    correction: Annotated[Text, Field(max_length=20_000)] | None = None
    """What the answer should have been."""
    user: Annotated[Text, Field(max_length=512)] | None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of an answer."""

    content: list[ChatLogprob]
    refusal: None = None


class Message(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(BaseModel):
    """A piece of the answer; the first one has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


FinishReason = Literal["stop", "length", "content_filter"]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Message
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class ChatReply(BaseModel):
    """The answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(BaseModel):
    """A server-sent event."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """Of the older API."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None


class TextReply(BaseModel):
    """The answers, or pieces of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "trunkline"
    digest: str
    """sha256 of the engine."""


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class FeedbackReply(BaseModel):
    """The rating is stored: on the disk, not only in memory."""

    id: str
    """Of the answer."""
    object: Literal["feedback"] = "feedback"
    created: int


class Health(BaseModel):
    """The process lives, or is ready."""

    status: Literal["ok"] = "ok"
