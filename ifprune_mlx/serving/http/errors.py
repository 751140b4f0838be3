"""Why a request is refused or has failed, in the form of the API that was asked: OpenAI's, or Anthropic's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from ifprune_mlx.errors import IfpruneError, PromptError
from ifprune_mlx.serving.engine.request import EngineClosedError, EngineFullError, GenerationFailedError

log = logging.getLogger("ifprune.serve")
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
# What pydantic's error types ask for.
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
    """A request that is refused.

    Attributes:
        status: of HTTP, 400 to 499; 500 and more where the server is at fault.
        param: the field at fault, such as `messages[1].content`; None if there is no such field.
        code: a short name of what is wrong, for programs; None if there is none.
        headers: of the answer.
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
    """The error of one field, whose message begins with the field's path."""
    return RequestError(f"{param}: {reason}", param, code=code)


def to_request_error(exc: Exception) -> RequestError:
    """What a client is told of an exception: itself if it is a refusal, its reason if the request caused it, and of
    all others only that something failed."""
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
        error.code = "context_length_exceeded" if "context" in str(exc) else "invalid_prompt"
    return error


def log_failure(what: str, exc: Exception) -> None:
    """Say in the log what a client is not told: why the server failed on its request."""
    # The model's failures come from another thread: a traceback of where they were passed on says nothing.
    log.error("%s: %s", what, exc, exc_info=not isinstance(exc, GenerationFailedError))


def error_body(path: str, error: RequestError) -> dict[str, Any]:
    """The JSON of an error, in the form of the API that `path` belongs to."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(path: str, error: RequestError) -> Response:
    """The whole answer to a request that is refused."""
    return Response(to_json(error_body(path, error)), error.status, error.headers, "application/json")


def to_json(content: Any) -> bytes:
    """JSON without spaces, as UTF-8."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def json_type(value: Any) -> str:
    """What JSON calls a value, with its article."""
    return _JSON_TYPES.get(type(value), "null" if value is None else "an object")


def _validation_error(exc: RequestValidationError) -> RequestError:
    """pydantic's errors as one: the deepest, since of a union it is the one of the alternative that was meant."""
    error = max(exc.errors(), key=lambda one: (len(one["loc"]), one["type"] not in _EXPECTED))
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    where, *place = error["loc"]
    param = _path(place, exc.body, kind) if where == "body" else str(place[0])
    if kind.startswith("union_tag"):  # the field that says which of several objects it is
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
    elif kind in ("too_short", "string_too_short"):
        reason = "is empty"
    elif kind in ("too_long", "string_too_long"):
        unit = "values" if kind == "too_long" else "characters"
        reason = f"has too many {unit}; give at most {context['max_length']}"
    else:
        reason, code = error["msg"], kind if kind == "unsupported_parameter" else None
    return field_error(param, reason if where == "body" else f"in the {where}, {reason}", code)


def _path(place: list[Any], body: Any, kind: str) -> str:
    """The path of a field, such as `messages[1].content`: pydantic's, without the names of a union's alternatives."""
    path, value = "", body
    for at, step in enumerate(place, 1):
        if isinstance(step, int) and isinstance(value, list):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}", value[step]
        elif kind == "missing" and at == len(place):
            path = f"{path}.{step}"
    return path.lstrip(".")
