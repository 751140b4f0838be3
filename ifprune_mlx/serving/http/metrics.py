"""Metrics of the HTTP requests and of the engine, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.slow_paths import SLOW_PATHS, slow_paths

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Metric, field of `EngineStats`, help.
_COUNTERS = (
    ("jobs", "requests", "Answers that ended: given, failed or cancelled."),
    ("jobs_failed", "failed", "Answers that failed."),
    ("jobs_cancelled", "cancelled", "Answers that were given up, as their client went away."),
    ("switches", "switches", "How often another selection was made active."),
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts."),
    ("cached_prompt_tokens", "cached_tokens", "Tokens of prompts that had been read already."),
    ("prefix_hits", "prefix_hits", "Answers whose prompt began with one that had been read already."),
    ("completion_tokens", "completion_tokens", "Tokens of answers."),
    ("select_seconds", "select_s", "Time spent finding selections."),
    ("switch_seconds", "switch_s", "Time spent moving neurons."),
    ("prefill_seconds", "prefill_s", "Time spent reading prompts, summed over answers."),
    ("decode_seconds", "decode_s", "Time spent on the tokens after the first, summed over answers."),
)
_GAUGES = (
    ("jobs_running", "running", "Answers being computed now."),
    ("jobs_waiting", "waiting", "Answers that wait now."),
    ("prompt_cache_bytes", "prompt_cache_bytes", "Memory of the prompts that were read before."),
    ("mlx_active_bytes", "active_bytes", "Memory of MLX's arrays, the model's included."),
    ("mlx_cache_bytes", "spare_bytes", "Memory that MLX keeps for its next arrays."),
)


class _EngineCollector(Collector):
    """Reads an engine's counters at every scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engine."""
        stats = self._engine.counters()
        for name, field, meaning in _COUNTERS:
            yield CounterMetricFamily(f"ifprune_{name}", meaning, getattr(stats, field))
        for name, field, meaning in _GAUGES:
            yield GaugeMetricFamily(f"ifprune_{name}", meaning, getattr(stats, field))
        slow, taken = GaugeMetricFamily("ifprune_slow_path", "1 if it is taken here.", labels=["path"]), slow_paths()
        for path in SLOW_PATHS:
            slow.add_metric([path], path in taken)
        yield slow


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "ifprune_http_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self.seconds = Counter("ifprune_http_seconds", "Time spent on requests.", ["path"], registry=self._registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
