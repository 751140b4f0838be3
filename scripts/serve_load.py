"""Loads `ifprune serve` for a while and says how it bore it: answers, errors, switches, and how its memory grew.

    python scripts/serve_load.py --minutes 10 [--model FOLDER] [--clients 8] [--tasks 4]
    python scripts/serve_load.py --minutes 10 --distinct         every conversation selects by words of its own

Starts a server of its own on a free port and asks it, as several clients at once: chats that select by their first
message, saved tasks, streams, and streams that are given up half way. First messages repeat, one for each task, as they
do where an app asks; what follows them differs. Prints a table, and the same as one JSON object on one
line; exits with 1 if any answer failed. Needs the extra `server`, and httpx.

Memory is said for the time after a warm-up, the first fifth, in which caches fill: of the process (`rss`), and what of
it MLX's arrays take (`mlx_active`, the model's and the prompt cache's included), what MLX keeps for its next ones
(`mlx_cache`), and the prompt cache (`prompt_cache`). Where `rss` grows and the rest does not, freed memory has not gone
back to the system; on Linux, glibc's allocator holds on to it. A growth within two or three times its error is none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np

TOPICS = (
    "Translate to French: the weather is nice in {}.",
    "Write a Python function that adds {} to a list.",
    "What is the capital of a country with {} million people?",
    "Write two lines of a poem about the number {}.",
)
KINDS = ("chat", "task", "stream", "given up")
_WARM_UP = 0.2  # of the time
_STRETCHES = 10
_GAUGES = {"mlx_active": "mlx_active_bytes", "mlx_cache": "mlx_cache_bytes", "prompt_cache": "prompt_cache_bytes"}


def main() -> int:
    """Run the load; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--model", help="an IFP checkpoint; left out, the embedded SmolLM2")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=4, choices=range(1, len(TOPICS) + 1))
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--prompt-cache-size", default="64MB", help="small, so that it is full after the warm-up")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--distinct", action="store_true", help="first messages differ: selections hardly ever repeat")
    given = parser.parse_args()
    model = [] if given.model is None else ["--model", given.model]
    with tempfile.TemporaryDirectory(prefix="ifprune-load-") as folder:
        environment = {**os.environ, "IFPRUNE_DATA": folder}
        tasks = [f"topic-{index}" for index in range(given.tasks)]
        for task, topic in zip(tasks, TOPICS, strict=False):
            save = ["--prompt", topic.format(3), "--density", str(given.density), "--save", task]
            subprocess.run(_ifprune("select", *model, *save), env=environment, check=True, capture_output=True)
        command = _ifprune("serve", *model, "--port", "0", "--json", "--log-level", "ERROR")
        command += ["--prompt-cache-size", given.prompt_cache_size]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                line = server.stdout.readline()
                if not line:
                    return 1  # it has said why
                load = Load(json.loads(line)["url"], tasks, given.max_tokens, given.density, given.distinct)
                result = load.run(given.minutes * 60, given.clients, server.pid)
            finally:
                server.terminate()
    for name, value in result.items():
        print(f"{name:<24} {json.dumps(value)}")
    print(json.dumps(result))
    return 1 if result["errors"] else 0


class Load:
    """Clients that ask one server."""

    def __init__(self, url: str, tasks: list[str], max_tokens: int, density: float, distinct: bool) -> None:
        self._url, self._tasks, self._max_tokens, self._density = url, tasks, max_tokens, density
        self._distinct = distinct
        self._lock = threading.Lock()
        self._answered: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._seconds: list[float] = []

    def run(self, seconds: float, clients: int, pid: int) -> dict[str, Any]:
        """Ask for a while.

        Returns:
            Counts, seconds, and MB of memory.
        """
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(seed, end)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        samples: list[dict[str, float]] = []
        while time.monotonic() < end:
            try:
                samples.append(self._memory(pid))
            except (OSError, httpx.HTTPError) as exc:
                with self._lock:
                    self._errors[f"metrics: {exc}"] += 1
            time.sleep(max(min(1.0, seconds / 20), 0.1))
        for thread in threads:
            thread.join()
        figures = self._figures()
        jobs, switches = figures["ifprune_jobs_total"], figures["ifprune_switches_total"]
        steady = samples[int(len(samples) * _WARM_UP) :]
        return {
            "seconds": seconds,
            "clients": clients,
            **{name: self._answered[name] for name in KINDS},
            "errors": sum(self._errors.values()),
            "error_kinds": dict(self._errors),
            "jobs": jobs,
            "jobs_cancelled": figures["ifprune_jobs_cancelled_total"],
            "switches": switches,
            "switches_per_job": round(switches / max(jobs, 1), 3),
            "completion_tokens": figures["ifprune_completion_tokens_total"],
            "tokens_per_s": round(figures["ifprune_completion_tokens_total"] / seconds, 1),
            "median_answer_s": round(float(np.median(self._seconds)), 3) if self._seconds else None,
            "rss_mb_at_start": round(samples[0]["rss"] / 1e6, 1),
            **{f"{name}_mb": _course(steady, name) for name in ("rss", *_GAUGES)},
        }

    def _client(self, seed: int, end: float) -> None:
        choose = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=300) as client:
            while time.monotonic() < end:
                kind, start = choose.choice(KINDS), time.monotonic()
                try:
                    self._ask(client, kind, choose)
                except (httpx.HTTPError, ValueError, KeyError) as exc:
                    with self._lock:
                        self._errors[f"{kind}: {type(exc).__name__} {str(exc)[:80]}"] += 1
                    continue
                with self._lock:
                    self._answered[kind] += 1
                    self._seconds.append(time.monotonic() - start)

    def _ask(self, client: httpx.Client, kind: str, choose: random.Random) -> None:
        topic = choose.randrange(len(self._tasks))
        number = choose.randrange(50)
        messages = [{"role": "user", "content": TOPICS[topic].format(number if self._distinct else 3)}]
        if not self._distinct:
            messages += [{"role": "assistant", "content": "Done."}, {"role": "user", "content": f"And for {number}?"}]
        selection = {"task": self._tasks[topic]} if kind == "task" else {"density": self._density}
        body = {
            "messages": messages,
            "max_tokens": self._max_tokens,
            "temperature": choose.choice((0, 1)),
            "ifprune": selection,
        }
        if kind in ("chat", "task"):
            response = client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            if not response.json()["ifprune"]["selection"]:
                raise ValueError("no selection")
            return
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
            stream.raise_for_status()
            last = ""
            for count, line in enumerate(stream.iter_lines()):
                if kind == "given up" and count > 4:
                    return
                last = line or last
            if kind == "stream" and last != "data: [DONE]":
                raise ValueError(f"the stream ended with {last[:80]!r}")

    def _memory(self, pid: int) -> dict[str, float]:
        """Bytes by name, and when it was so, in seconds."""
        figures = self._figures()
        held = {name: figures[f"ifprune_{gauge}"] for name, gauge in _GAUGES.items()}
        return {"time": time.monotonic(), "rss": _resident(pid), **held}

    def _figures(self) -> dict[str, int]:
        text = httpx.get(f"{self._url}/metrics", timeout=60).text
        pairs = (line.rsplit(maxsplit=1) for line in text.splitlines() if not line.startswith("#"))
        return {name: int(float(value)) for name, value in pairs}


def _ifprune(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ifprune_cli.main", *arguments]


def _resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(shown.stdout.strip() or 0) * 1024


def _course(samples: list[dict[str, float]], name: str) -> dict[str, float | None]:
    """How one kind of memory developed, in MB: its least, mean and most, and its growth an hour with a standard error.

    The growth is the slope of the means of ten stretches, whose scatter gives the error: what single samples are off is
    what the work of that second takes, and neighbours are off alike.
    """
    hours = np.array([sample["time"] for sample in samples]) / 3600
    sizes = np.array([sample[name] for sample in samples]) / 1e6
    figures = {"least": sizes.min(), "mean": sizes.mean(), "most": sizes.max(), "per_hour": None, "error": None}
    if len(samples) >= _STRETCHES:
        at, means = ([part.mean() for part in np.array_split(values, _STRETCHES)] for values in (hours, sizes))
        (growth, _), covariance = np.polyfit(np.array(at) - at[0], means, 1, cov=True)
        figures |= {"per_hour": growth, "error": covariance[0, 0] ** 0.5}
    return {key: None if value is None else round(float(value), 1) for key, value in figures.items()}


if __name__ == "__main__":
    sys.exit(main())
