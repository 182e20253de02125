# SPDX-License-Identifier: Apache-2.0
"""/v1/documents: texts that are handed in once and asked about often."""

from typing import Any, BinaryIO, cast

from fastapi import Request as HttpRequest
from starlette.datastructures import FormData, UploadFile

from rapid_jax.engine.errors import TooLarge
from rapid_jax.runtime.errors import printable
from rapid_jax.serve.bodies import kind_of, read_body
from rapid_jax.serve.errors import ApiError, bad
from rapid_jax.serve.extract import extract_text
from rapid_jax.serve.fields import DocumentChange, DocumentOptions, DocumentRequest
from rapid_jax.serve.interface import DocumentInfo
from rapid_jax.serve.runs import unless_gone
from rapid_jax.serve.service import Service

_FIELDS = 8
_MOST = 1 << 16  # bytes of a field that is no file
_LONGEST = 256  # characters of a name


async def add(http: HttpRequest, service: Service) -> dict[str, Any]:
    """Takes in a document: JSON with its text, or a form with a file that is text, PDF or HTML."""
    owner = service.owner(http.headers.get("authorization"))
    service.check_taking()
    if kind_of(http) == "multipart/form-data":
        text, options = await _read_upload(http, service)
    else:
        body = await read_body(http, DocumentRequest, service)
        text, options = body.text, body
    if not text.strip() or "\0" in text:
        raise bad("text", "expected a document with text in it, got " + ("a binary one" if text.strip() else "none"))
    named = {"name": printable(options.name or ""), "expires_in": options.expires_in}
    named |= {"public": bool(options.public), "pinned": bool(options.pinned)}
    try:
        return document_json(await service.aside(service.engine.documents.add, text, owner=owner, **named))
    except TooLarge as error:
        raise ApiError(413, str(error), code="document_too_large", param="text") from error


async def listed(http: HttpRequest, service: Service) -> dict[str, Any]:
    """The documents of whoever asks."""
    owner = service.owner(http.headers.get("authorization"))
    found = await service.aside(service.engine.documents.all, owner=owner)
    return {"object": "list", "data": [document_json(info) for info in found]}


async def one(http: HttpRequest, id: str, service: Service) -> dict[str, Any]:
    """What is known about a document."""
    owner = service.owner(http.headers.get("authorization"))
    return document_json(await service.aside(service.engine.documents.info, id, owner=owner))


async def change(http: HttpRequest, id: str, service: Service) -> dict[str, Any]:
    """Pins a document, or lets it go again."""
    owner = service.owner(http.headers.get("authorization"))
    body = await read_body(http, DocumentChange, service)
    return document_json(await service.aside(service.engine.documents.pin, id, body.pinned, owner=owner))


async def remove(http: HttpRequest, id: str, service: Service) -> dict[str, Any]:
    """Forgets a document."""
    owner = service.owner(http.headers.get("authorization"))
    await service.aside(service.engine.documents.remove, id, owner=owner)
    return {"id": id, "object": "document", "deleted": True}


def document_json(info: DocumentInfo) -> dict[str, Any]:
    """A document as the API shows it."""
    return {
        "id": info.id,
        "object": "document",
        "name": info.name,
        "bytes": info.bytes,
        "characters": info.characters,
        "tokens": info.tokens,
        "state": info.state,
        "pinned": info.pinned,
        "public": info.public,
        "created_at": int(info.created),
        "expires_at": None if info.expires is None else int(info.expires),
    }


async def _read_upload(http: HttpRequest, service: Service) -> tuple[str, DocumentOptions]:
    """The text of the file in a form, and the form's other fields; the file is on disk without a name meanwhile."""
    async with http.form(max_files=1, max_fields=_FIELDS, max_part_size=_MOST) as form:
        options = _options(form)
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise bad("file", "expected a form with a file in the field 'file'")
        # The parser keeps a small file in memory; asked for its descriptor it writes it out.
        file = cast(BinaryIO, upload.file)
        file.fileno()
        await upload.seek(0)
        text = await unless_gone(http, _read(file, upload.filename or "", service))
        name = options.name or printable((upload.filename or "").replace("\\", "/").rpartition("/")[2])[:_LONGEST]
        return text, options.model_copy(update={"name": name})


async def _read(file: BinaryIO, filename: str, service: Service) -> str:
    async with service.uploads:
        return await extract_text(file, filename)


def _options(form: FormData) -> DocumentOptions:
    given: dict[str, Any] = {}
    for key, value in form.multi_items():
        if key == "file":
            continue
        if not isinstance(value, str) or key in given:
            raise ApiError(400, "expected each field of the form once, and one file in the field 'file'")
        given[key] = value
    for key in ("public", "pinned"):
        if key in given:
            given[key] = {"true": True, "false": False}.get(given[key].lower(), given[key])
    if "expires_in" in given:
        try:
            given["expires_in"] = float(given["expires_in"])
        except ValueError as error:
            raise bad("expires_in", "expected a number of seconds") from error
    return DocumentOptions.model_validate(given)
