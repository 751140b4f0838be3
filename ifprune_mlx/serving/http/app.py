"""The web application of `ifprune serve`: its paths, how bodies are decoded, and the OpenAPI document."""

from __future__ import annotations

import gc
import json
import math
import re
from asyncio import Semaphore
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_type_hints

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from ifprune_mlx import __version__
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.serving.http import schemas_responses as answers
from ifprune_mlx.serving.http.anthropic import Anthropic
from ifprune_mlx.serving.http.errors import RETRY_AFTER, RequestError, error_response, json_type, to_request_error
from ifprune_mlx.serving.http.metrics import MEDIA_TYPE, Metrics
from ifprune_mlx.serving.http.middleware import Limits, RequestMiddleware
from ifprune_mlx.serving.http.openai import OpenAI
from ifprune_mlx.serving.http.service import Service

_PAGE = Path(__file__).parent / "page"
# Only files of these kinds in the page's folder are served.
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_PAGE_FILES = {
    "/" if file.name == "index.html" else f"/{file.relative_to(_PAGE).as_posix()}": file
    for file in sorted(_PAGE.rglob("*"))
    if file.suffix in _PAGE_TYPES
}
_PAGE_HEADERS = {
    # With trusted types, HTML comes into the page through DOMPurify alone.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_REFUSALS: dict[int | str, str] = {
    400: "The request cannot be answered; the message says why.",
    404: "There is no such model, path or selection.",
    408: "The body took too long.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    "4XX": "Refused.",
    "5XX": "The server failed, or ends.",
}
_EVENT = {
    "description": "One event of a stream.",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
# A larger body waits until no other large one is prepared: while one is decoded or checked in a call into C, no other
# thread runs. Objects take longest there, so they are bounded.
_LARGE = 1 << 16
_MOST_OBJECTS = 50_000
_BODIES_HELD = 8  # of the largest size, at once
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def make_app(service: Service, limits: Limits, *, ui: bool = False) -> ASGIApp:
    """The ASGI application that serves one model.

    Args:
        ui: serve the chat page at `/`.
    """
    metrics = Metrics(service.engine)
    api = make_api(service, metrics, with_key=limits.api_key is not None, max_body=limits.max_body)
    if ui:
        for path, file in _PAGE_FILES.items():
            api.add_route(path, _file(file.read_bytes(), _PAGE_TYPES[file.suffix]))
    open_paths = frozenset({"/health", *(_PAGE_FILES if ui else ())})
    paths = frozenset({*api.openapi()["paths"], "/openapi.json", *open_paths})
    app: ASGIApp = RequestMiddleware(api, limits, metrics, paths, open_paths)
    if limits.origins:
        app = CORSMiddleware(
            app,
            allow_origins=limits.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def make_api(service: Service, metrics: Metrics, *, with_key: bool, max_body: int = Limits.max_body) -> FastAPI:
    """Every path but the page's, without the limits for single requests.

    Args:
        with_key: the OpenAPI document says that clients need a key.
        max_body: bytes; several bodies of this size are held at once.
    """
    api = FastAPI(
        title="ifprune serve",
        version=__version__,
        description=f"Serves {service.name}. Every request is computed on the neurons that it selects. Fields that are "
        "not named here are ignored.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            HTTPException: _not_found,
            RequestValidationError: _refused,
            IfpruneError: _refused,
            ClientDisconnect: _refused,
            # Starlette raises the exception again after this answer, and `RequestMiddleware` logs it.
            Exception: _refused,
        },
    )
    openai, anthropic = OpenAI(service), Anthropic(service)
    api.state.bodies = _Bodies(service, _BODIES_HELD * max_body)

    async def health() -> dict[str, Any]:
        """Whether the server runs; needs no key."""
        return {"status": "ok", "model": service.name}

    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=MEDIA_TYPE)

    async def tasks() -> dict[str, Any]:
        """Saved selections that requests may name."""
        return {"tasks": await service.in_thread(service.tasks)}

    async def selection(hash: str) -> dict[str, Any]:
        """The neurons of a recently used selection."""
        return service.selection(hash)

    # This is documentation only: `RequestMiddleware` checks the key, before a body is read.
    key: Any = {"dependencies": [Depends(HTTPBearer(scheme_name="key", auto_error=False))] if with_key else []}
    events: Any = {"also": {"text/event-stream": {"schema": _EVENT}}}
    anthropics: Any = {"error": answers.AnthropicError}
    api.router.route_class = _JSONRoute
    api.post("/v1/chat/completions", **key, **_described(answers.ChatCompletion, **events))(openai.chat)
    api.post("/v1/completions", **key, **_described(answers.TextCompletion, **events))(openai.complete)
    api.post("/v1/messages", **key, **_described(answers.Message, **events, **anthropics))(anthropic.create)
    api.post("/v1/messages/count_tokens", **key, **_described(answers.TokenTotal, **anthropics))(anthropic.count)
    api.get("/v1/models", **key, **_described(answers.ModelList))(openai.models)
    api.get("/v1/models/{model:path}", **key, **_described(answers.ModelCard))(openai.model)
    api.get("/v1/ifprune/tasks", **key, **_described(answers.SavedTasks))(tasks)
    api.get("/v1/ifprune/selections/{hash}", **key, **_described(answers.SelectionMasks))(selection)
    api.get(
        "/metrics",
        response_class=Response,
        **key,
        **_described(None, also={"text/plain": {"schema": {"type": "string"}}}),
    )(figures)
    api.get("/health", **_described(answers.Health))(health)
    api.head("/health", include_in_schema=False)(health)
    return api


def _file(content: bytes, media_type: str) -> Callable[[Request], Response]:
    return lambda request: Response(content, media_type=media_type, headers=_PAGE_HEADERS)


def decode_json(body: bytes | bytearray) -> dict[str, Any]:
    """Decode a body, which must be a JSON object. 2.0 becomes 2, as JSON has one kind of number.

    Raises:
        RequestError: if it is not a JSON object, is nested too deeply, holds very many objects, or has a duplicate key,
            NaN, an infinite number or half a surrogate pair.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_constant, parse_float=_number, object_pairs_hook=_Objects()
        )
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as exc:
        raise RequestError("the body is nested too deeply", code="invalid_json") from exc
    except UnicodeEncodeError as exc:
        raise RequestError("the body has half a surrogate pair in a string", code="invalid_json") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"the body is not UTF-8 text (byte {exc.start})", code="invalid_json") from exc
    except ValueError as exc:
        raise RequestError(f"the body is not JSON ({exc})", code="invalid_json") from exc
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {json_type(value)}", code="invalid_json")
    return value


class _JSONRequest(Request):
    """A request whose body has been decoded and checked, so that FastAPI need not do so in the event loop."""

    checked: BaseModel

    async def body(self) -> bytes:
        return b"{}"  # FastAPI only tests whether it is empty

    async def json(self) -> Any:
        return self.checked


class _Bodies:
    """Receives bodies, and decodes and checks them off the event loop.

    Args:
        most_bytes: of all bodies that are received, or wait to be prepared.
    """

    def __init__(self, service: Service, most_bytes: int) -> None:
        self._service, self._most_bytes, self._held = service, most_bytes, 0
        self._large = Semaphore(1)

    @asynccontextmanager
    async def checked(self, request: Request, schema: type[BaseModel]) -> AsyncGenerator[BaseModel, None]:
        """The body as its schema has it, while the request is prepared.

        Raises:
            RequestError, RequestValidationError: if it cannot be used, or too many others are held.
        """
        async with AsyncExitStack() as until_prepared:
            body = bytearray()
            until_prepared.callback(lambda: self._hold(-len(body)))
            async for part in request.stream():
                body += part
                self._hold(len(part))
            if len(body) > _LARGE:
                await until_prepared.enter_async_context(self._large)
            checked = await self._service.in_thread(_decode_and_check, body, schema)
            if isinstance(checked, RequestError):
                raise checked
            yield checked

    def _hold(self, size: int) -> None:
        self._held += size
        if size > 0 and self._held > self._most_bytes:
            reason, later = "the server holds too many large bodies; try again in a few seconds", RETRY_AFTER
            raise RequestError(reason, status=429, code="too_many_bytes", headers={"Retry-After": later})


def _decode_and_check(body: bytearray, schema: type[BaseModel]) -> BaseModel | RequestError:
    """The error is returned: one that is raised would carry the whole value to the event loop, to be freed there."""
    with _no_collection() if len(body) > _LARGE else nullcontext():
        value = decode_json(body)
        try:
            return schema.model_validate(value)
        except ValidationError as exc:
            errors = [{**error, "loc": ("body", *error["loc"])} for error in exc.errors(include_url=False)]
            return to_request_error(RequestValidationError(errors, body=value))
        finally:
            del value


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector looks through millions of new lists again and again, and nothing else runs meanwhile."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _JSONRoute(APIRoute):
    """A route that decodes bodies strictly, as JSON whatever their media type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        schema = get_type_hints(self.endpoint)["body"]

        async def decode_and_handle(request: Request) -> Response:
            headers = [header for header in request.scope["headers"] if header[0] != b"content-type"]
            scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
            prepared = _JSONRequest(scope, request.receive)
            async with request.app.state.bodies.checked(request, schema) as prepared.checked:
                return await handle(prepared)

        return decode_and_handle


def _described(
    answer: type[BaseModel] | None, *, error: type[BaseModel] = answers.Error, also: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A path's responses for the OpenAPI document; `also` is their content in another media type."""
    responses: dict[int | str, Any] = {
        status: {"model": error, "description": description} for status, description in _REFUSALS.items()
    }
    responses[429]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    if also is not None:
        responses[200] = {"content": also}
    return {"response_model": answer, "responses": responses}


async def _refused(request: Request, exc: Exception) -> Response:
    if isinstance(exc, ClientDisconnect):  # while it sent its body; nobody reads the answer
        exc = RequestError("the body is incomplete", code="incomplete_body")
    return error_response(request.url.path, to_request_error(exc))


async def _not_found(request: Request, exc: Exception) -> Response:
    """Answer what Starlette itself refuses: an unknown path, or a method that the path does not have."""
    assert isinstance(exc, HTTPException)
    reason = {404: "no such path", 405: f"{request.method} is not for this path"}.get(exc.status_code, exc.detail)
    code = {404: "path_not_found", 405: "method_not_allowed"}.get(exc.status_code)
    error = RequestError(reason, status=exc.status_code, code=code, headers=exc.headers)
    return error_response(request.url.path, error)


class _Objects:
    """Makes the objects of one body, and counts them."""

    left = _MOST_OBJECTS

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.left -= 1
        if self.left < 0:
            raise RequestError(f"the body holds more than {_MOST_OBJECTS} objects", status=413, code="body_too_large")
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("an object has a key twice")
        return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
