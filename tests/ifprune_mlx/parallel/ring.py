"""Starts the ranks of a ring on the loopback device by hand: `mlx.launch` itself keeps a core busy."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.measure_ranks import free_ports
from tests.cli.process import environment


def ring_variables(count: int, folder: Path) -> list[dict[str, str]]:
    """What `mlx.launch` puts into the environment of each rank; `folder` gets the hosts file."""
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(count)]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False, dir=folder) as file:
        json.dump(hosts, file)
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": file.name} for rank in range(count)]


def start_ring(
    arguments: Sequence[str | Path],
    count: int,
    cache: Path,
    others: Mapping[int, Sequence[str | Path]] | None = None,
) -> list[subprocess.Popen[str]]:
    """The processes of a ring, by rank, each with pipes.

    Args:
        arguments: those of Python.
        others: by rank, other arguments.
    """
    return [
        subprocess.Popen(
            [sys.executable, *map(str, (others or {}).get(rank, arguments))],
            env=environment(cache, **variables),
            cwd=Path(__file__).parents[3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, variables in enumerate(ring_variables(count, cache))
    ]


def finish(ring: Sequence[subprocess.Popen[str]], seconds: float = 60) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank, once all have ended."""
    try:
        said = [one.communicate(timeout=seconds) for one in ring]
        return [(one.returncode, *out) for one, out in zip(ring, said, strict=True)]
    finally:
        for one in ring:
            one.kill()


def run_ring(
    arguments: Sequence[str | Path], count: int, cache: Path, seconds: float = 60
) -> list[tuple[int, str, str]]:
    """See `start_ring` and `finish`."""
    return finish(start_ring(arguments, count, cache), seconds)
