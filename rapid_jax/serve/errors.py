# SPDX-License-Identifier: Apache-2.0
"""Errors in OpenAI's form, each with its status."""

import math
import re
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from rapid_jax.engine.errors import Draining, QueueFull, TooLarge, UnknownDocument
from rapid_jax.engine.request import Cancelled
from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.json_input import shown

_LONGEST = 500  # characters of a message
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_FIELD = re.compile(r"[a-z][a-z_]*")
# How pydantic names the branches of a union in the place of an error.
_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "nullable", "constrained", "literal"})


class ApiError(Exception):
    """A request that gets no answer, with the status and the words that the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        self.message = legible(message)[:_LONGEST]

    def to_json(self) -> dict[str, Any]:
        """The body: OpenAI's form."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer, with Retry-After where another try may help and WWW-Authenticate where a key would."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.to_json(), self.status, headers)


def bad(param: str | None, message: str) -> ApiError:
    """A value that cannot be used: status 400."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def api_error_of(error: BaseException) -> ApiError | None:
    """What the client is told of an error that it can do something about; None for the server's own faults."""
    match error:
        case ApiError():
            return error
        case TooLarge():
            return ApiError(413, str(error), code="context_length_exceeded")
        case UnknownDocument():
            return ApiError(404, str(error), code="document_not_found", param="document")
        case ValidationError():
            return _invalid(error)
        case InputError():
            return ApiError(400, str(error))
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
        case Draining():
            return draining()
        case Cancelled():
            return ApiError(503, "the request was taken back", code="cancelled", retry_after=1)
        case _:
            return None


def draining() -> ApiError:
    """The server ends: another one may answer."""
    return ApiError(503, "the server is about to end and takes no new requests", code="draining", retry_after=5)


def own_fault() -> ApiError:
    """Something that should not happen; the log says what."""
    return ApiError(500, "an error of the server's own; its log says which", code="internal_error")


def _invalid(error: ValidationError) -> ApiError:
    """The first field that is wrong: what it may be, joined where it may be several things, and what was got.

    Of the errors of a union's branches those deepest in the value are of the branch that was meant.
    """
    errors = [(_place(item["loc"]), item) for item in error.errors(include_url=False, include_context=False)]
    begin = errors[0][0]
    place = max((place for place, _ in errors if place[: len(begin)] == begin), key=len)
    first = [item for other, item in errors if other == place]
    words = " or ".join(dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in first))
    if first[0]["type"] == "extra_forbidden":
        words = "there is no such field"
    got = "" if first[0]["type"] == "missing" else f", got {shown(first[0]['input'])}"
    return bad(".".join(place) or None, words + got)


def _place(location: tuple[int | str, ...]) -> tuple[str, ...]:
    known = (part for part in location if isinstance(part, int) or (_FIELD.fullmatch(part) and part not in _BRANCHES))
    return tuple(map(str, known))
