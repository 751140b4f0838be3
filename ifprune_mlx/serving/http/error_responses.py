"""Refusals and failures in the form of the API that was asked: OpenAI's, or Anthropic's under /v1/messages."""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.responses import Response

from ifprune_mlx.errors import IfpruneError, PromptError
from ifprune_mlx.serving.engine.request import EngineClosedError, EngineFullError, GenerationFailedError
from ifprune_mlx.serving.http.fields import RequestError

log = logging.getLogger("ifprune.serve")
RETRY_AFTER = "2"
_OPENAI = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class JsonResponse(Response):
    """A JSON answer, as UTF-8 text."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The content as JSON; NaN, which JSON has not, is an error of ours."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """JSON without spaces, as UTF-8."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def refusal(exc: Exception) -> RequestError:
    """What a client is told of an exception: itself if it is a refusal, its reason if a user's input caused it, and of
    all others only that something failed."""
    if isinstance(exc, RequestError):
        return exc
    message = " ".join(str(exc).split())
    if isinstance(exc, EngineFullError):
        return RequestError(message, status=429, code="queue_full", headers={"Retry-After": RETRY_AFTER})
    if isinstance(exc, EngineClosedError):
        return RequestError(message, status=503, code="shutting_down")
    if isinstance(exc, PromptError):
        return RequestError(message, code="context_length_exceeded" if "context" in message else "invalid_prompt")
    if isinstance(exc, IfpruneError):
        return RequestError(message)
    return RequestError("the server failed on this request; its log says why", status=500, code="internal_error")


def log_failure(what: str, exc: Exception) -> None:
    """Say in the log what a client is not told: why the server failed on its request."""
    # The model's failures come from another thread: where they were passed on says nothing.
    log.error("%s: %s", what, exc, exc_info=not isinstance(exc, GenerationFailedError))


def error_body(path: str, error: RequestError) -> dict[str, Any]:
    """The JSON of an error, as the API to which `path` belongs words it."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    kind = _OPENAI.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(path: str, error: RequestError) -> Response:
    """The whole answer to a request that is refused."""
    return JsonResponse(error_body(path, error), error.status, error.headers)
