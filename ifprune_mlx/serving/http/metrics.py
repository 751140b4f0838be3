"""Counts requests, writes a log line for each, and tells Prometheus of them and of the engine's work."""

from __future__ import annotations

import logging
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ifprune_mlx.serving.engine.request import EngineStats
from ifprune_mlx.serving.http.error_responses import error_response, log_failure, refusal

log = logging.getLogger("ifprune.serve")
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_GONE = 499  # nothing was answered, as the client went away

# Name, type and help of what the engine counts.
_ENGINE = (
    ("jobs", "requests", "counter", "Answers that ended: given, failed or cancelled."),
    ("jobs_failed", "failed", "counter", "Answers that failed."),
    ("jobs_cancelled", "cancelled", "counter", "Answers that were given up, as their client went away."),
    ("jobs_running", "running", "gauge", "Answers being computed now."),
    ("jobs_waiting", "waiting", "gauge", "Answers that wait now."),
    ("switches", "switches", "counter", "How often another selection was made active."),
    ("prompt_tokens", "prompt_tokens", "counter", "Tokens of prompts."),
    ("cached_prompt_tokens", "cached_tokens", "counter", "Tokens of prompts that had been read already."),
    ("completion_tokens", "completion_tokens", "counter", "Tokens of answers."),
    ("select_seconds", "select_s", "counter", "Time spent finding selections."),
    ("switch_seconds", "switch_s", "counter", "Time spent moving neurons."),
    ("prefill_seconds", "prefill_s", "counter", "Time spent reading prompts, summed over answers."),
    ("decode_seconds", "decode_s", "counter", "Time spent on the tokens after the first, summed over answers."),
    ("prompt_cache_bytes", "prompt_cache_bytes", "gauge", "Memory of the prompts that were read before."),
    ("mlx_active_bytes", "active_bytes", "gauge", "Memory of MLX's arrays, the model's included."),
    ("mlx_cache_bytes", "spare_bytes", "gauge", "Memory that MLX keeps for its next arrays."),
)


class Watch:
    """Sees every request and its answer; an ASGI application around another, which must not raise."""

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        self._app, self._paths = app, paths
        self._answered: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on; what was raised and not answered becomes an answer here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, ended, start = _GONE, False, time.monotonic()

        async def sent(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception as exc:
            error = refusal(exc)
            if error.status >= 500:
                log_failure(f"{scope['path'].encode('unicode_escape').decode()} failed", exc)
            if status == _GONE:
                await error_response(scope["path"], error)(scope, receive, sent)
            elif not ended:
                raise
        finally:
            seconds = time.monotonic() - start
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._answered[path, status] += 1
            self._seconds[path] += seconds  # type: ignore[assignment]
            note = scope.get("state", {}).get("note")
            where = scope.get("raw_path", b"").decode("ascii", "replace")[:100]
            log.info("%s %s %d %.2f s%s", scope["method"], where, status, seconds, f", {note}" if note else "")

    def text(self, counters: EngineStats) -> str:
        """All figures, in Prometheus' text format."""
        lines = []
        for name, field, kind, meaning in _ENGINE:
            full = f"ifprune_{name}_total" if kind == "counter" else f"ifprune_{name}"
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}", f"{full} {getattr(counters, field)}"]
        lines += ["# HELP ifprune_http_requests_total Requests answered.", "# TYPE ifprune_http_requests_total counter"]
        for (path, status), count in sorted(self._answered.items()):
            lines.append(f'ifprune_http_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += [
            "# HELP ifprune_http_seconds_total Time spent on requests.",
            "# TYPE ifprune_http_seconds_total counter",
        ]
        lines += [
            f'ifprune_http_seconds_total{{path="{path}"}} {value}' for path, value in sorted(self._seconds.items())
        ]
        return "\n".join(lines) + "\n"
