# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests: JSON within limits, as one of the declared kinds."""

from typing import TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel

from rapid_jax.runtime.json_input import parse_json
from rapid_jax.serve.errors import ApiError
from rapid_jax.serve.service import Service

T = TypeVar("T", bound=BaseModel)
_SOON = 1 << 16  # bytes that are parsed in no time
_WHAT = "the request's body"


def kind_of(http: HttpRequest) -> str:
    """The media type of the body, without its parameters."""
    return http.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(http: HttpRequest, kind: type[T], service: Service) -> T:
    """The body as `kind`. Raises ApiError or what `api_error_of` knows for anything else."""
    if (got := kind_of(http)) != "application/json":
        raise ApiError(415, f"expected Content-Type: application/json, got {got[:60]!a}", code="content_type")
    data = await http.body()
    if len(data) <= _SOON:
        return _parse(data, kind)
    return await service.aside(_parse, data, kind)


def _parse(data: bytes, kind: type[T]) -> T:
    return kind.model_validate(parse_json(data, _WHAT, max(len(data), 1)))
