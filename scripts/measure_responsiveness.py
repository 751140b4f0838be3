"""How soon `ifprune serve` answers: the first byte of a stream, and /health while large bodies are prepared.

    python scripts/measure_responsiveness.py [--model FOLDER] [--repeats 5]

Starts a server of its own on a free port. First it streams from an idle server, with prompts of several lengths up to
the model's context: the seconds until the first byte of the response's body. Then it sends bodies that are large in
several ways, six of each at once, and asks for /health all the while. Prints a table, and the same as one JSON object
on one line. Needs the extra `server`, and httpx.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

_SHARES = (0.01, 0.1, 0.25, 0.5, 0.9)  # of the context, if a token has four characters
_AT_ONCE = 6
_WORDS = "The weather is nice, and so they walk. "


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="an IFP checkpoint; left out, the embedded SmolLM2")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    model = [] if given.model is None else ["--model", given.model]
    command = [
        sys.executable,
        "-m",
        "ifprune_cli.main",
        "serve",
        *model,
        "--port",
        "0",
        "--json",
        "--log-level",
        "ERROR",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            with httpx.Client(base_url=json.loads(server.stdout.readline())["url"], timeout=600) as client:
                result = {"first_byte": _streams(client, given.repeats), "health": _load(client)}
        finally:
            server.terminate()
    for figures in (*result["first_byte"], *result["health"]):
        print("  ".join(f"{name} {value}" for name, value in figures.items()))
    print(json.dumps(result))


def _streams(client: httpx.Client, repeats: int) -> list[dict[str, Any]]:
    """Seconds to the first byte of a body, the median and the most, by the prompt's length."""
    context = client.get("/v1/models").json()["data"][0]["ifprune"]["context_length"] or 8192
    found = []
    for share in _SHARES:
        size, seconds = int(share * context * 4), []
        for repeat in range(repeats):
            text = f"{repeat} {share} " + _WORDS * (size // len(_WORDS) + 1)
            body = {"messages": [{"role": "user", "content": text[:size]}], "max_tokens": 1, "stream": True}
            while "ifprune_jobs_running 0.0" not in client.get("/metrics").text:
                time.sleep(0.1)
            start = time.perf_counter()
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                next(answer.iter_raw())
                seconds.append(time.perf_counter() - start)
                if answer.status_code != 200:
                    raise SystemExit(f"{size} characters: HTTP status {answer.status_code}")
        median, most = round(statistics.median(seconds), 4), round(max(seconds), 4)
        found.append({"characters": size, "median_s": median, "most_s": most})
    return found


def _load(client: httpx.Client) -> list[dict[str, Any]]:
    """Seconds of /health, the median and the most, while six bodies of a kind are under way."""
    ids = ",".join(str(index % 50_000) for index in range(1_500_000))
    message = '{"role":"user","content":"a"}'
    part = '{"type":"text","text":"a"}'
    bodies = {
        "1.5M token ids": ("/v1/completions", f'{{"prompt":[{ids}]}}'),
        "10 MB of text": ("/v1/completions", json.dumps({"prompt": _WORDS * 250_000})),
        "10 MB of messages": ("/v1/chat/completions", f'{{"messages":[{",".join([message] * 330_000)}]}}'),
        "49,000 messages": ("/v1/chat/completions", f'{{"messages":[{",".join([message] * 49_000)}]}}'),
        "49,000 parts": (
            "/v1/chat/completions",
            f'{{"messages":[{{"role":"user","content":[{",".join([part] * 49_000)}]}}]}}',
        ),
        "10 MB of arrays": ("/v1/chat/completions", f'{{"messages":[{",".join(["[]"] * 3_300_000)}]}}'),
    }
    found = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, (path, body) in bodies.items():
            content, seconds = body.encode(), []
            start = time.perf_counter()
            answers = [
                pool.submit(httpx.post, client.base_url.join(path), content=content, timeout=600) for _ in range(6)
            ]
            while not all(answer.done() for answer in answers):
                asked = time.perf_counter()
                client.get("/health").raise_for_status()
                seconds.append(time.perf_counter() - asked)
                time.sleep(0.01)
            figures = {
                "load": name,
                "bytes": len(content),
                "statuses": sorted({a.result().status_code for a in answers}),
            }
            figures |= {"median_s": round(statistics.median(seconds), 4), "most_s": round(max(seconds), 4)}
            found.append(figures | {"all_s": round(time.perf_counter() - start, 2)})
    return found


if __name__ == "__main__":
    main()
