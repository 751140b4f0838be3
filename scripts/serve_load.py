"""Loads `ifprune serve` for a while and says how it bore it: answers, errors, switches, and how its memory grew.

    python scripts/serve_load.py --minutes 10 [--model FOLDER] [--clients 8] [--tasks 4]
    python scripts/serve_load.py --minutes 10 --distinct         every conversation selects by words of its own

Starts a server of its own on a free port and asks it, as several clients at once: chats that select by their first
message, saved tasks, streams, and streams that are given up half way. First messages repeat, one for each task, as they
do where an app asks; what follows them differs. Prints a table, and the same as one JSON object on one
line; exits with 1 if any answer failed. Needs the extra `server`, and httpx.
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
_WARM_UP = 0.2  # of the time: caches fill, and that is no leak


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
            Counts, seconds, and bytes of memory an hour.
        """
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(seed, end)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        memory: list[tuple[float, int]] = []
        while time.monotonic() < end:
            memory.append((time.monotonic(), _resident(pid)))
            time.sleep(max(min(1.0, seconds / 20), 0.1))
        for thread in threads:
            thread.join()
        figures = self._figures()
        jobs, switches = figures["ifprune_jobs_total"], figures["ifprune_switches_total"]
        steady = memory[int(len(memory) * _WARM_UP) :]
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
            "rss_first": memory[0][1],
            "rss_last": memory[-1][1],
            "rss_bytes_per_hour": round(_slope(steady) * 3600),
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
        wish = {"task": self._tasks[topic]} if kind == "task" else {"density": self._density}
        body = {
            "messages": messages,
            "max_tokens": self._max_tokens,
            "temperature": choose.choice((0, 1)),
            "ifprune": wish,
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

    def _figures(self) -> dict[str, int]:
        text = httpx.get(f"{self._url}/metrics", timeout=60).text
        pairs = (line.split() for line in text.splitlines() if not line.startswith("#"))
        return {name: int(float(value)) for name, value in pairs}


def _ifprune(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ifprune_cli.main", *arguments]


def _resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(shown.stdout.strip() or 0) * 1024


def _slope(points: list[tuple[float, int]]) -> float:
    """Least squares: bytes a second."""
    if len(points) < 2:
        return 0.0
    times, sizes = np.array(points, dtype=np.float64).T
    return float(np.polyfit(times - times[0], sizes, 1)[0])


if __name__ == "__main__":
    sys.exit(main())
