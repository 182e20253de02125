# SPDX-License-Identifier: Apache-2.0
"""The routes of the server and its OpenAPI schema."""

import time
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from rapid_jax import __version__
from rapid_jax.runtime.templates import style
from rapid_jax.serve import replies, uploads
from rapid_jax.serve.bodies import read_body
from rapid_jax.serve.chat import chat
from rapid_jax.serve.completions import complete
from rapid_jax.serve.errors import ApiError, bad
from rapid_jax.serve.fields import BODIES, ChatRequest, CompletionRequest, DocumentRequest, TokenizeRequest
from rapid_jax.serve.fields import DocumentChange as Change
from rapid_jax.serve.guard import Guard
from rapid_jax.serve.service import Service

_ASKED = (400, 401, 403, 404, 408, 413, 415, 429, 503)
_READ = (401, 403, 404)
_SCHEMAS = "#/components/schemas/"
_PAGE = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("", "text/css")}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a server."""
    app = FastAPI(title="rapid serve", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, service=service)
    app.add_exception_handler(HTTPException, _of_http)
    _add_openai(app, service)
    _add_documents(app, service)
    _add_state(app, service)
    _add_page(app)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def model() -> dict[str, Any]:
        models = service.engine.models
        sizes = {"created": created, "owned_by": "rapid_jax", "max_model_len": models.target.config.context_size}
        return {"id": models.name, "object": "model", **sizes}

    @app.get("/v1/models", **_replies(replies.ModelList, 401, 403))
    async def models(http: HttpRequest) -> Response:
        """The model that answers."""
        service.owner(http.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}", **_replies(replies.ModelInfo, *_READ))
    async def one_model(http: HttpRequest, name: str) -> Response:
        """The model, if it is this one."""
        service.owner(http.headers.get("authorization"))
        service.check_model(name)
        return JSONResponse(model())

    @app.post("/v1/chat/completions", **_replies(replies.ChatCompletion, *_ASKED, stream=True), **_body(ChatRequest))
    async def chat_completions(http: HttpRequest) -> Response:
        """Answers a chat, about a document where there is one."""
        return await chat(http, service)

    @app.post("/v1/completions", **_replies(replies.Completion, *_ASKED, stream=True), **_body(CompletionRequest))
    async def completions(http: HttpRequest) -> Response:
        """Continues texts."""
        return await complete(http, service)

    @app.post("/tokenize", **_replies(replies.Tokenized, 400, 401, 403, 404, 408, 413, 415), **_body(TokenizeRequest))
    async def tokenize(http: HttpRequest) -> Response:
        """The token ids of a text, or of a chat as the model reads it."""
        service.owner(http.headers.get("authorization"))
        body = await read_body(http, TokenizeRequest, service)
        if body.model is not None:
            service.check_model(body.model)
        ids = await service.aside(_ids, body, service)
        most = service.engine.models.target.config.context_size
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": most})


def _ids(body: TokenizeRequest, service: Service) -> list[int]:
    tokenizer = service.engine.models.target.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise bad("prompt", "expected either prompt or messages")
    if body.messages is not None:
        return tokenizer.encode(tokenizer.chat([{"role": one.role, "content": one.text} for one in body.messages]))
    return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)


def _add_documents(app: FastAPI, service: Service) -> None:
    taken = _replies(replies.Document, 400, 401, 403, 408, 413, 415, 503)

    @app.post("/v1/documents", **taken, **_body(DocumentRequest, form=True))
    async def add_document(http: HttpRequest) -> Response:
        """Takes in a document."""
        return JSONResponse(await uploads.add(http, service))

    @app.get("/v1/documents", **_replies(replies.DocumentList, 401, 403))
    async def documents(http: HttpRequest) -> Response:
        """The documents of this key."""
        return JSONResponse(await uploads.listed(http, service))

    @app.get("/v1/documents/{id}", **_replies(replies.Document, *_READ))
    async def document(http: HttpRequest, id: str) -> Response:
        """What is known about a document."""
        return JSONResponse(await uploads.one(http, id, service))

    changed = _replies(replies.Document, 400, 401, 403, 404, 408, 413, 415)

    @app.patch("/v1/documents/{id}", **changed, **_body(Change))
    async def change_document(http: HttpRequest, id: str) -> Response:
        """Pins a document, or lets it go again."""
        return JSONResponse(await uploads.change(http, id, service))

    @app.delete("/v1/documents/{id}", **_replies(replies.DocumentDeleted, *_READ))
    async def delete_document(http: HttpRequest, id: str) -> Response:
        """Forgets a document."""
        return JSONResponse(await uploads.remove(http, id, service))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", **_replies(replies.Health, 403, unwell=replies.Health))
    async def health() -> Response:
        """Whether the server is alive."""
        return JSONResponse({"status": service.phase}, 503 if service.phase == "failed" else 200)

    @app.get("/ready", **_replies(replies.Health, 403, unwell=replies.Health))
    async def ready() -> Response:
        """Whether it takes requests."""
        return JSONResponse({"status": service.phase}, 200 if service.phase == "ready" else 503)

    metrics = _replies(None, 403)
    metrics["responses"][200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", response_class=Response, **metrics)
    async def figures() -> Response:
        """Figures, as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    folder = resources.files("rapid_jax.serve") / "static"

    def serve(path: str, content: bytes, kind: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind)

    css = style("rapid_jax", "theme.css", "trace.css").encode() + (folder / "page.css").read_bytes()
    for path, (name, kind) in _PAGE.items():
        serve(path, (folder / name).read_bytes() if name else css, kind)


async def _of_http(http: HttpRequest, error: Exception) -> Response:
    """What the framework itself refuses: no such path or method, a form that is none."""
    del http
    assert isinstance(error, HTTPException)
    answer = ApiError(error.status_code, str(error.detail)).response()
    answer.headers.update(error.headers or {})
    return answer


def _replies(
    good: type[BaseModel] | None, *bad: int, stream: bool = False, unwell: type[BaseModel] | None = None
) -> dict[str, Any]:
    """What a route may answer."""
    found: dict[int | str, dict[str, Any]] = {status: {"model": replies.ErrorBody} for status in bad}
    if good is not None:
        found[200] = {"model": good}
    if stream:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        found[200]["content"] = {"text/event-stream": {"schema": event}}
    if unwell is not None:
        found[503] = {"model": unwell}
    return {"responses": found}


def _body(kind: type[BaseModel], *, form: bool = False) -> dict[str, Any]:
    """The body that a route reads by itself."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{kind.__name__}"}}}
    if form:
        fields: dict[str, Any] = {"file": {"type": "string", "contentMediaType": "application/octet-stream"}}
        fields |= {name: {"type": "string"} for name in ("name", "expires_in")}
        fields |= {name: {"type": "string", "enum": ["true", "false"]} for name in ("public", "pinned")}
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": fields, "required": ["file"]}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _schema(app: FastAPI) -> Mapping[str, Any]:
    """The OpenAPI schema; routes read their bodies themselves, so their kinds are put in here."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        for kind in BODIES:
            own = kind.model_json_schema(ref_template=_SCHEMAS + "{model}")
            known |= own.pop("$defs", {}) | {kind.__name__: own}
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema
