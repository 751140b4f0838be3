"""The web application of `ifprune serve`: every path, inside its limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.serving.http.anthropic import Anthropic
from ifprune_mlx.serving.http.error_responses import JsonResponse, error_response, refusal
from ifprune_mlx.serving.http.fields import RequestError
from ifprune_mlx.serving.http.metrics import MEDIA_TYPE, Watch
from ifprune_mlx.serving.http.middleware import Guard, Limits
from ifprune_mlx.serving.http.openai import OpenAI
from ifprune_mlx.serving.http.openapi import document
from ifprune_mlx.serving.http.service import Service

_PAGE = Path(__file__).parent / "page"
# The page's own files, each by its path; nothing else of the folder is given out.
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(service: Service, limits: Limits, *, ui: bool = False) -> ASGIApp:
    """The ASGI application that serves one model.

    Args:
        ui: whether it has the chat page, at `/`.
    """
    openai, anthropic = OpenAI(service), Anthropic(service)
    described = document(service.name, limits.api_key is not None)

    async def health(request: HTTPRequest) -> Response:
        return JsonResponse({"status": "ok", "model": service.name})

    async def metrics(request: HTTPRequest) -> Response:
        return Response(watch.text(service.engine.counters()), media_type=MEDIA_TYPE)

    async def openapi(request: HTTPRequest) -> Response:
        return JsonResponse(described)

    async def tasks(request: HTTPRequest) -> Response:
        return JsonResponse({"tasks": await service.aside(service.tasks)})

    async def selection(request: HTTPRequest) -> Response:
        return JsonResponse(service.selection(request.path_params["hash"]))

    routes = [
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/completions", openai.complete, methods=["POST"]),
        Route("/v1/models", openai.models, methods=["GET"]),
        Route("/v1/models/{model:path}", openai.model, methods=["GET"]),
        Route("/v1/messages", anthropic.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", anthropic.count, methods=["POST"]),
        Route("/v1/ifprune/tasks", tasks, methods=["GET"]),
        Route("/v1/ifprune/selections/{hash}", selection, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]
    if ui:
        for path, (name, media_type) in PAGE_FILES.items():
            routes.append(Route(path, _file((_PAGE / name).read_bytes(), media_type), methods=["GET"]))
        limits = Limits(**{**vars(limits), "open_paths": limits.open_paths | PAGE_FILES.keys()})
    routed = Starlette(
        routes=routes,
        # What `Exception` is for, Starlette raises again when it is answered: `Watch` writes the log.
        exception_handlers={
            HTTPException: _not_found,
            IfpruneError: _refused,
            ClientDisconnect: _gone,
            Exception: _refused,
        },
    )
    routed.router.redirect_slashes = False
    app: ASGIApp = Guard(routed, limits)
    if limits.origins:
        app = CORSMiddleware(
            app,
            allow_origins=limits.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    watch = Watch(app, frozenset(route.path for route in routes))
    return watch


def _file(content: bytes, media_type: str) -> Callable[[HTTPRequest], Response]:
    def give(request: HTTPRequest) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return give


async def _refused(request: HTTPRequest, exc: Exception) -> Response:
    return error_response(request.url.path, refusal(exc))


async def _not_found(request: HTTPRequest, exc: Exception) -> Response:
    """What Starlette itself refuses: an unknown path, or a method that a path has not."""
    assert isinstance(exc, HTTPException)
    path, headers = request.url.path, exc.headers
    reason = {404: "no such path", 405: f"{request.method} is not for this path"}.get(exc.status_code, exc.detail)
    code = {404: "path_not_found", 405: "method_not_allowed"}.get(exc.status_code)
    return error_response(path, RequestError(reason, status=exc.status_code, code=code, headers=headers))


async def _gone(request: HTTPRequest, exc: Exception) -> Response:
    """The client went away while it sent its body; nobody reads this."""
    return error_response(request.url.path, RequestError("the body is incomplete", code="incomplete_body"))
