"""Every request has the selection that it asks for, and says which that was."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ifprune_mlx import Selection
from tests.cli.process import run
from tests.ifprune_mlx.serving.http.serving import Served, eventually, serving
from tests.tiny import write_checkpoint

PROMPTS = ("Translate to French: good morning", "Write a Python function that sorts a list")


def selected(checkpoint: Path, cache: Path, prompt: str, *options: str) -> str:
    result = run("select", "--model", checkpoint, "--prompt", prompt, "--json", *options, cache=cache)
    assert result.returncode == 0, result.stderr
    return str(json.loads(result.stdout)["selection"])


def figures(served: Served, text: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = served.chat(text, **fields)["ifprune"]
    return found


def test_what_a_request_can_ask_for(served: Served) -> None:
    assert figures(served, "a", ifprune={"dense": True})["selection"] is None
    static = figures(served, "a", ifprune={"selector": "static", "density": 0.5})
    assert (static["selector"], static["density"]) == ("static", 0.5)
    assert static["active_parameters"] < static["total_parameters"]
    assert figures(served, "b", ifprune={"selector": "static", "density": 0.5})["selection"] == static["selection"]
    few = figures(served, "a", ifprune={"selector": "random", "active_parameters": 80_000})
    assert few["active_parameters"] <= 80_000


def test_headers_ask_as_well_and_the_body_goes_first(served: Served) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    headers = {"x-ifprune-density": "0.5", "x-ifprune-policy": "turn"}
    answer = served.post("/v1/chat/completions", body, headers=headers).json()
    assert answer["ifprune"]["density"] == 0.5
    answer = served.post("/v1/chat/completions", body | {"ifprune": {"density": 0.25}}, headers=headers).json()
    assert answer["ifprune"]["density"] == 0.25


def test_the_policy_says_which_message_selects(served: Served) -> None:
    def chosen(policy: str, *texts: str) -> str:
        messages = [
            {"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(texts)
        ]
        options = {"selector": "random", "policy": policy}
        body = {"messages": messages, "max_tokens": 2, "ifprune": options}
        return str(served.post("/v1/chat/completions", body).json()["ifprune"]["selection"])

    assert chosen("first", "one", "ok", "two") == chosen("first", "one")
    assert chosen("turn", "one", "ok", "two") == chosen("first", "two")
    assert chosen("first", "one") != chosen("first", "two")
    # Arbitrary selections have nothing in common, so that each message is another topic.
    assert chosen("auto", "one", "ok", "two") == chosen("auto", "two") == chosen("first", "two")


def test_a_selection_used_of_late_can_be_looked_at(served: Served) -> None:
    key = figures(served, "look at me", ifprune={"selector": "random", "density": 0.25})["selection"]
    found = served.get(f"/v1/ifprune/selections/{key}").json()
    assert found["density"] == 0.25
    ids = []
    for mask, width in zip(found["masks"], found["widths"], strict=True):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(mask), dtype=np.uint8))[:width]
        ids.append(np.flatnonzero(bits).astype(np.int32))
    assert Selection(tuple(ids), tuple(found["widths"]), "random").hash == key
    assert found["kept"] == [len(each) for each in ids]


def test_no_selection_is_missed_however_short_the_answers(served: Served) -> None:
    def chosen(number: int) -> str:
        options = {"selector": "random", "density": 0.25}
        return str(figures(served, f"short answer {number}", max_tokens=1, ifprune=options)["selection"])

    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(chosen, range(32)))
    assert len(keys) == 32
    for key in keys:
        assert served.get(f"/v1/ifprune/selections/{key}").status_code == 200


def test_tasks_are_listed_and_used(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    saved = selected(checkpoint, tmp_path, "French, please", "--selector", "random", "--save", "french")
    with serving(checkpoint, tmp_path) as server:
        [task] = server.get("/v1/ifprune/tasks").json()["tasks"]
        assert (task["name"], task["selection"], task["shipped"]) == ("french", saved, False)
        for name in ("french", "FRENCH"):
            assert figures(server, "anything", ifprune={"task": name})["selection"] == saved
        assert server.get(f"/v1/ifprune/selections/{saved}").status_code == 200
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        answer = server.post("/v1/messages", body, headers={"x-ifprune-task": "french"}).json()
        assert answer["ifprune"]["selection"] == saved
    with serving(checkpoint, tmp_path, "--task", "french") as server:
        assert figures(server, "anything")["selection"] == saved
        assert figures(server, "anything", ifprune={"dense": True})["selection"] is None


@pytest.mark.real
def test_interleaved_requests_have_the_selections_that_their_prompts_select(
    served_real: Served, smollm2: Path, tmp_path: Path
) -> None:
    expected = [selected(smollm2, tmp_path, prompt) for prompt in PROMPTS]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: figures(served_real, PROMPTS[number % 2]), range(6)))
    assert [each["selection"] for each in found] == expected * 3
    assert {each["selector"] for each in found} == {"learned"}


@pytest.mark.real
def test_what_is_interleaved_is_said_as_it_is_alone(served_real: Served) -> None:
    def said(prompt: str) -> str:
        return str(served_real.chat(prompt, max_tokens=16)["choices"][0]["message"]["content"])

    alone = [said(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(said, PROMPTS * 2)) == alone * 2
    assert all(alone)


@pytest.mark.real
def test_a_real_answer_that_is_given_up_ends(served_real: Served) -> None:
    import openai

    cancelled = served_real.metric("ifprune_jobs_cancelled_total")
    with openai.OpenAI(base_url=f"{served_real.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "Count to a thousand."}], stream=True
        )
        next(iter(stream))
        stream.close()
    eventually(lambda: served_real.metric("ifprune_jobs_cancelled_total") == cancelled + 1)
