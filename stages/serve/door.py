"""What stands before the routes: API keys, the size of a body and the time it may take, and the record of each request when it is over.

It is plain ASGI, so that nothing of a body is read before the key is known to be right, and a stream passes untouched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.serve.keys import Keyring
from stages.serve.record import Note, event, measure, trace_answer
from stages.serve.refusals import Refused

ANSWERS = ("/v1/chat/completions", "/v1/completions")
ROUTES = (*ANSWERS, "/v1/feedback", "/v1/models")


class Door:
    """The middleware; what it needs of a loaded service is in `app.state`."""

    def __init__(self, app: ASGIApp) -> None:
        """Args: app: what is behind it."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        note = Note(route=next((route for route in ROUTES if scope["path"].startswith(route)), "other"))
        scope.setdefault("state", {})["note"] = note

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-model-digest", state.assistant.digest.encode())]
            await send(message)

        try:
            note.key = state.keyring.admit(headers.get("authorization", ""), "feedback" if note.route == "/v1/feedback" else "answer")
            if scope["method"] == "POST" and note.route in ANSWERS and state.scheduler.admission.full():
                raise state.scheduler.admission.refusal()  # before a byte of the body is read: turning away must cost next to nothing
            body = await _body(receive, headers, state.assistant.settings.limits.body, state.assistant.settings.limits.upload_seconds)
            await self._app(scope, _replay(body, receive), telling)
        except Refused as refused:
            await JSONResponse(refused.body(), refused.status, headers=refused.headers())(scope, receive, telling)
        finally:
            self._record(note, state.keyring, headers, scope)

    def _record(self, note: Note, keyring: Keyring, headers: Mapping[str, str], scope: Scope) -> None:
        state = scope["app"].state
        note.status = note.status or 500  # an error that nobody expected: it goes on its way to the log
        row = event(note, state.assistant)
        measure(row, state.scheduler.waiting)
        if note.status == 429:  # the queue had no room for it: the key may come again
            keyring.give_back(note.key)
        else:
            keyring.charge(note.key, int(str(row["prompt_tokens"])) + int(str(row["completion_tokens"])))
        if scope["method"] == "POST":
            trace_answer(note, state.assistant, row, headers)
            state.store.put(row)


async def _body(receive: Receive, headers: Mapping[str, str], most: int, seconds: float) -> bytes:
    """The whole body.

    Raises:
        Refused: 413 for one that is too long, 408 for one that takes too long.
    """
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise Refused(413, f"the request has {length} bytes; the limit is {most}", code="request_too_large")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while (message := await receive())["type"] == "http.request":
                body += message.get("body", b"")
                if len(body) > most:
                    raise Refused(413, f"the request has more than {most} bytes, which is the limit", code="request_too_large")
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {seconds:g} seconds", code="timeout") from None
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body again, then what comes from the client: that it went away."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
