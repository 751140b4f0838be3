"""Commands in two processes of a ring, as `mlx.launch` starts them: one talks, and all end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.cli.process import run_here
from tests.ifprune_mlx.parallel.ring import finish, run_ring, start_ring

MAIN = ["-m", "ifprune_cli.main"]
SECONDS = 5.0


def answer(checkpoint: Path, *more: str | Path) -> list[str | Path]:
    return ["generate", "--model", checkpoint, "-p", "hello there", "-m", "8", "--json", *more]


def test_generate_answers_as_one_process_does_and_one_rank_talks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (code, out, err), (other_code, other_out, other_err) = run_ring([*MAIN, *answer(tiny_checkpoint)], 2, tmp_path)
    assert (code, other_code, other_out, other_err) == (0, 0, "", ""), err
    alone = json.loads(run_here(*answer(tiny_checkpoint)).stdout)
    ours = json.loads(out)
    assert [ours[key] for key in ("text", "selection", "completion_tokens")] == [
        alone[key] for key in ("text", "selection", "completion_tokens")
    ]


def test_an_error_on_one_rank_ends_all_with_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The other rank's copy of the checkpoint is not there."""
    missing = tmp_path / "missing"
    given = {1: [*MAIN, *answer(missing)]}
    (code, out, err), (other_code, _, _) = finish(start_ring([*MAIN, *answer(tiny_checkpoint)], 2, tmp_path, given))
    assert (code, other_code, out) == (1, 1, "")
    assert err.startswith("ifprune: error: rank 1: ")
    assert str(missing) in err
    assert err.count("\n") == 1


def read_and_kill(url: str, victim: subprocess.Popen[str]) -> None:
    """Read a long answer, and kill a process in the midst of it."""
    body = {"messages": [{"role": "user", "content": "go on"}], "stream": True, "logit_bias": {"2": -100}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=SECONDS + 60) as stream:
        for count, _ in enumerate(stream.iter_lines()):
            if count == 5:
                victim.kill()


def test_a_killed_rank_ends_the_server_in_mid_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Within seconds, with one line; and the port is free again."""
    options = ["--port", "0", "--json", "--log-level", "error", "--dense", "--max-tokens", "400"]
    ring = start_ring([*MAIN, "serve", "--model", tiny_checkpoint, *options], 2, tmp_path)
    try:
        assert ring[0].stdout is not None
        url = json.loads(ring[0].stdout.readline())["url"]
        with pytest.raises(httpx.HTTPError):
            read_and_kill(url, ring[1])
        ring[0].wait(SECONDS)
        _, err = ring[0].communicate()
        assert ring[0].returncode == 1
        said = [line for line in err.splitlines() if "listens on" not in line]
        assert len(said) == 1
        assert said[0].startswith("ifprune: error: rank 1 is gone")
        with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))):
            pass
    finally:
        finish(ring)


def test_a_killed_leader_ends_the_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """SIGTERM, too, which the leader ends with 130 at; nothing stays behind."""
    for ending in (signal.SIGKILL, signal.SIGTERM):
        ring = start_ring([*MAIN, "chat", "--model", tiny_checkpoint], 2, tmp_path)
        try:
            assert ring[0].stdin is not None
            assert ring[0].stdout is not None
            ring[0].stdin.write("hello\n")
            ring[0].stdin.flush()
            assert os.read(ring[0].stdout.fileno(), 1)  # in mid-answer
            ring[0].send_signal(ending)
            ring[1].wait(SECONDS)
        finally:
            finish(ring)
        assert ring[0].returncode in (-signal.SIGKILL, 130)
        assert ring[1].returncode != 0


def test_a_chat_says_on_two_ranks_what_it_says_on_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Messages are read by rank 0; a command that fails is told once, and the chat goes on."""
    text = "hello\n/density 7\n/policy turn\nanother thing\n/quit\n"
    options = ["chat", "--model", str(tiny_checkpoint), "-m", "6", "--selector", "static"]
    ring = start_ring([*MAIN, *options], 2, tmp_path)
    out, err = ring[0].communicate(text, timeout=200)
    others = finish(ring[1:])
    alone = run_here(*options, stdin=text.encode())
    assert (out, ring[0].returncode) == (alone.stdout, alone.returncode)
    assert [line for line in err.splitlines() if "error" in line] == [
        line for line in alone.stderr.splitlines() if "error" in line
    ]
    assert [code for code, *_ in others] == [1]


def test_info_says_what_each_rank_holds(tiny_checkpoint: Path) -> None:
    """About half of the weights at two ranks; norms are on both."""
    whole, half = (
        json.loads(run_here("info", "--model", tiny_checkpoint, "--ranks", ranks, "--json").stdout)["fits"]
        for ranks in ("1", "2")
    )
    for one, two in zip(whole, half, strict=True):
        assert 0.5 <= two["resident"] / one["resident"] < 0.55
