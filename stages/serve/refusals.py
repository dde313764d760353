"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Status -> type, where it is not that of a bad request or of a server's fault."""


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    """Dotted path in the request."""
    code: str | None
    """For programs."""


class ErrorReply(BaseModel):
    """The body of every answer with a status of 400 and more."""

    error: Problem


class Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: float | None = None) -> None:
        """Args: status: HTTP status. param: what is wrong, as a dotted path. code: for programs. retry_after: seconds."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, object]:
        """The error object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else whole(self.param)
        return ErrorReply(error=Problem(message=whole(self.message), type=kind, param=param, code=self.code)).model_dump()

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, rounded up, where it makes sense to come again."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, -int(-self.retry_after // 1)))}


def whole(text: str) -> str:
    """The text without half surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def invalid(errors: Sequence[Mapping[str, object]], unsupported: Mapping[str, str]) -> Refused:
    """The refusal of a body that is not of its type.

    Args:
        errors: pydantic's, as FastAPI gives them.
        unsupported: parameter of OpenAI's API that this service has not -> what to do instead.
    """
    first = errors[0]
    loc = first["loc"]
    where = ".".join(str(part) for part in loc[1:]) if isinstance(loc, tuple | list) else ""
    kind, message = str(first["type"]), str(first["msg"])
    if kind == "json_invalid":
        return Refused(400, f"the body is no JSON: {message}", code="invalid_json")
    if not where:
        return Refused(400, f"the body is no JSON object: {message}", code="invalid_json")
    top = where.partition(".")[0]
    if kind == "extra_forbidden" and where == top:
        return Refused(400, f"unknown parameter: {top}", top, "unsupported_parameter")
    if top in unsupported:
        return Refused(400, f"{top} is not supported{unsupported[top]}", top, "unsupported_parameter")
    code = "missing_required_parameter" if kind == "missing" else "invalid_value"
    return Refused(400, f"{where}: {message}", where, code)
