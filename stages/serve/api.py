"""The routes: OpenAI's chat completions, completions and models, ratings, health and metrics, and the OpenAPI document of it all.

Every error has OpenAI's shape (`stages.serve.refusals`). Every answer carries the digest of the model that gave it, in `system_fingerprint` and in the
header `x-model-digest`. A stream is `text/event-stream`; whether there is one says `stream` in the request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from stages.serve.answers import Answers, Gone
from stages.serve.assistant import Assistant
from stages.serve.door import Door
from stages.serve.keys import Keyring, may_instruct
from stages.serve.refusals import ErrorReply, Refused, invalid
from stages.serve.scheduler import Scheduler
from stages.serve.store import Store
from stages.serve.upstream.answers import UpstreamAnswers
from stages.serve.upstream.line import HEADER, Line, classify
from stages.serve.wire import (
    UNSUPPORTED,
    ChatReply,
    ChatRequest,
    CompletionRequest,
    FeedbackReply,
    FeedbackRequest,
    Health,
    ModelCard,
    ModelList,
    TextReply,
)  # fmt: skip

if TYPE_CHECKING:
    from stages.serve.upstream.engine import UpstreamEngine

ALWAYS = {
    401: "no right API key",
    403: "the key lacks the scope, or the request may not leave for an upstream model",
    408: "the body came too slowly",
    413: "the body is too long",
    429: "over a budget, or the service has too much to do",
}
ANSWER = ALWAYS | {
    400: "a parameter is wrong or not supported",
    404: "no such model",
    500: "the engine failed",
    502: "the upstream model failed",
    503: "shutting down",
    504: "it took too long",
}
STREAM = {"description": "the answer, or with `stream: true` its pieces", "content": {"text/event-stream": {"schema": {"type": "string"}}}}

log = logging.getLogger(__name__)


def errors(meanings: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document."""
    return {status: {"model": ErrorReply, "description": what} for status, what in meanings.items()}


def open_service(app: FastAPI, assistant: Assistant, keyring: Keyring, store: Store) -> None:
    """Put a loaded model behind the routes, and start its slots."""
    app.state.assistant, app.state.keyring, app.state.store = assistant, keyring, store
    app.state.rating = anyio.CapacityLimiter(4)  # threads of its own: a slow database must not take those of the answers
    app.state.scheduler = _scheduler(assistant)
    if keyring.open:
        log.warning("the service is open: anybody may ask. TRUNKLINE_API_KEYS names the keys, `python -m stages.serve.keys <name>` makes one")


def _scheduler(assistant: Assistant) -> Scheduler | Line:
    engine, settings = assistant.engine, assistant.settings
    if settings.engine.kind == "upstream":
        return Line(cast("UpstreamEngine", engine), settings.limits.waiting)
    return Scheduler(
        engine,
        slots=settings.engine.threads,
        batch=settings.engine.batch,
        most_waiting=settings.limits.waiting,
        room=settings.engine.context,
        first_token=settings.limits.first_token_seconds,
        kept=assistant.kept(),
    )


def close_service(app: FastAPI) -> None:
    """End the slots, and write down what waits."""
    app.state.scheduler.close()
    app.state.store.close()


def create_app() -> FastAPI:
    """The application; `open_service` must have been called before the first request."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if getattr(app.state, "scheduler", None) is not None:
            await anyio.to_thread.run_sync(close_service, app)

    app = FastAPI(title="Trunkline", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Door)
    _errors(app)
    _answers(app)
    _others(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers())

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, invalid(error.errors(), UNSUPPORTED))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return await refused(request, Refused(error.status_code, str(error.detail), code="invalid_request"))


def _named(app: FastAPI, name: str) -> Assistant:
    """The model of this name.

    Raises:
        Refused: there is none.
    """
    assistant: Assistant = app.state.assistant
    if name != assistant.name:
        raise Refused(404, f"the model {name!r} does not exist; this service has {assistant.name!r}", "model", "model_not_found")
    return assistant


def _begin(app: FastAPI, request: Request, asked: ChatRequest | CompletionRequest) -> Answers:
    assistant, scheduler, key = _named(app, asked.model), app.state.scheduler, request.state.note.key
    if not isinstance(scheduler, Line):
        return Answers(assistant=assistant, scheduler=scheduler, request=asked, instructs=may_instruct(key))
    return UpstreamAnswers(
        assistant=assistant, scheduler=scheduler, request=asked, instructs=may_instruct(key),
        line=scheduler, classification=classify(key, request.headers.getlist(HEADER)), gone=request.is_disconnected,
    )  # fmt: skip


def _answers(app: FastAPI) -> None:
    async def answer(request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        answers = _begin(app, request, asked)
        request.state.note.answers = answers
        try:
            await answers.start()
            if asked.stream:
                await answers.begun(request.is_disconnected)
        except Gone:
            return Response(status_code=499)
        if asked.stream:
            return StreamingResponse(answers.events(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        try:
            return Response((await answers.whole(request.is_disconnected)).model_dump_json(), media_type="application/json")
        except Gone:
            return Response(status_code=499)  # nobody reads it; the event has it

    @app.post("/v1/chat/completions", response_model=None, responses={200: {"model": ChatReply, **STREAM}, **errors(ANSWER)})
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await answer(request, asked)

    @app.post("/v1/completions", response_model=None, responses={200: {"model": TextReply, **STREAM}, **errors(ANSWER)})
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Go on from a text."""
        return await answer(request, asked)


def _others(app: FastAPI) -> None:
    @app.post("/v1/feedback", responses=errors(ALWAYS | {400: "a field is wrong", 503: "it could not be stored"}))
    async def feedback(request: Request, rating: FeedbackRequest) -> FeedbackReply:
        """Rate an answer. When this is answered with 200, the rating is on the disk."""
        now, key = time.time(), request.state.note.key
        row = {"at": now, "answer_id": rating.id, "digest": app.state.assistant.digest, "key": key.id if key else None, **rating.model_dump(exclude={"id"})}
        try:
            await anyio.to_thread.run_sync(app.state.store.rate, row, limiter=app.state.rating)
        except SQLAlchemyError as error:
            log.error("a rating was not written: %s", type(error).__name__)  # the error's text may quote the rating
            raise Refused(503, "the rating could not be stored: come again", code="store_unavailable", retry_after=10) from error
        return FeedbackReply(id=rating.id, created=int(now))

    @app.get("/v1/models", responses=errors(ALWAYS))
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[_card(app.state.assistant)])

    @app.get("/v1/models/{name}", responses=errors(ALWAYS | {404: "no such model"}))
    async def model(name: str) -> ModelCard:
        """The same, by its name."""
        return _card(_named(app, name))

    @app.get("/healthz")
    async def healthz() -> Health:
        """The process lives."""
        return Health()

    @app.get("/readyz", responses={503: {"model": ErrorReply, "description": "no model is loaded"}})
    async def readyz() -> Health:
        """The model is loaded."""
        if getattr(app.state, "scheduler", None) is None:
            raise Refused(503, "no model is loaded yet", code="not_ready", retry_after=1)
        return Health()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def prometheus() -> Response:
        """Prometheus metrics."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def unknown(request: Request) -> Response:
        raise Refused(404, f"there is no {request.method} {request.url.path} here", code="unknown_url")


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, without the 422 that it adds everywhere (here it is a 400), and with the API key."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, methods in made["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if path.startswith("/v1/"):
                    operation["security"] = [{"key": []}, {}]
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema


def _card(assistant: Assistant) -> ModelCard:
    return ModelCard(id=assistant.name, digest=assistant.digest)
