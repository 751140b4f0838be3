"""Errors of requests, in the form of the API that the client uses: OpenAI's or Anthropic's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from ifprune_mlx.errors import ContextLengthError, IfpruneError, PromptError
from ifprune_mlx.serving.engine.request import EngineClosedError, EngineFullError, GenerationFailedError

log = logging.getLogger("ifprune_mlx.serving")
RETRY_AFTER = "2"
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# The type that each of pydantic's errors expects.
_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_JSON_TYPES = {bool: "true or false", str: "a string", int: "a number", float: "a number", list: "an array"}


class RequestError(IfpruneError):
    """A refused request.

    Attributes:
        status: the HTTP status; 500 and more if the server is at fault.
        param: the wrong field, such as `messages[1].content`, if there is one.
        code: a short name of the error, for programs.
        headers: headers of the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def field_error(param: str, reason: str, code: str | None = None) -> RequestError:
    """An error whose message begins with the path of the wrong field."""
    return RequestError(f"{param}: {reason}", param, code=code)


def to_request_error(exc: Exception) -> RequestError:
    """The error that a client sees: a refusal as it is, the message of an IfpruneError, else only that it failed."""
    if isinstance(exc, RequestError):
        return exc
    if isinstance(exc, RequestValidationError):
        return _validation_error(exc)
    if not isinstance(exc, IfpruneError):
        return RequestError("the server failed on this request; its log says why", status=500, code="internal_error")
    error = RequestError(" ".join(str(exc).split()))
    if isinstance(exc, EngineFullError):
        error.status, error.code, error.headers = 429, "queue_full", {"Retry-After": RETRY_AFTER}
    elif isinstance(exc, EngineClosedError):
        error.status, error.code = 503, "shutting_down"
    elif isinstance(exc, PromptError):
        error.code = "context_length_exceeded" if isinstance(exc, ContextLengthError) else "invalid_prompt"
    return error


def log_failure(what: str, exc: Exception) -> None:
    """Log why the server failed on a request, which clients do not see."""
    # The model fails in another thread: a traceback of this one would not show where.
    log.error("%s: %s", what, exc, exc_info=not isinstance(exc, (GenerationFailedError, EngineClosedError)))


def error_body(path: str, error: RequestError) -> dict[str, Any]:
    """An error as JSON, in the form of the API that `path` belongs to."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(path: str, error: RequestError) -> Response:
    """The response to a refused request."""
    return Response(to_json(error_body(path, error)), error.status, error.headers, "application/json")


def to_json(content: Any) -> bytes:
    """Encode as JSON without spaces, in UTF-8."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def json_type(value: Any) -> str:
    """The JSON type of a value, with its article."""
    return _JSON_TYPES.get(type(value), "null" if value is None else "an object")


def _validation_error(exc: RequestValidationError) -> RequestError:
    """Pick one of pydantic's errors: the deepest, as that is in the alternative of a union that was meant."""
    error = max(exc.errors(), key=lambda one: (len(one["loc"]), one["type"] not in _EXPECTED))
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    where, *place = error["loc"]
    param = _path(place, exc.body, kind) if where == "body" else str(place[0])
    if kind.startswith("union_tag"):  # the field that tells a union's alternatives apart
        param = f"{param}.{context['discriminator'][1:-1]}"
    code = None
    if kind in ("missing", "union_tag_not_found") or (value is None and kind in _EXPECTED):
        reason, code = "is required", "missing_required_parameter"
    elif kind in _EXPECTED:
        reason = f"must be {_EXPECTED[kind]}, not {json_type(value)}"
    elif kind == "union_tag_invalid" and param.endswith("type"):
        reason = f"{context['tag'][:40]!r} is not supported here; this model reads text only"
        code = "unsupported_content"
    elif kind in ("union_tag_invalid", "literal_error"):
        values = context.get("expected_tags") or context["expected"]
        reason = f"must be {'one of ' if ', ' in values or ' or ' in values else ''}{values}"
    elif kind == "extra_forbidden":
        reason = "is unknown"
    elif kind in ("too_short", "string_too_short"):
        reason = "is empty"
    elif kind in ("too_long", "string_too_long"):
        unit = "values" if kind == "too_long" else "characters"
        reason = f"has too many {unit}; give at most {context['max_length']}"
    else:
        reason, code = error["msg"], kind if kind == "unsupported_parameter" else None
    return field_error(param, reason if where == "body" else f"in the {where}, {reason}", code)


def _path(place: list[Any], body: Any, kind: str) -> str:
    """Format pydantic's path as `messages[1].content`, without the names of a union's alternatives."""
    path, value = "", body
    for at, step in enumerate(place, 1):
        if isinstance(step, int) and isinstance(value, list):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}", value[step]
        elif kind == "missing" and at == len(place):
            path = f"{path}.{step}"
    return path.lstrip(".")
