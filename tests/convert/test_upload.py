"""Uploading: the real client against a hub on this machine, and back again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ifprune_convert.card import CARD, model_card, write_card
from ifprune_convert.pipeline import Options
from ifprune_mlx import Checkpoint
from ifprune_mlx.checkpoint.format import MANIFEST
from tests.cli.process import environment, run
from tests.hub_stub import HubStub, serve
from tests.tiny import write_checkpoint, write_source

NAME = "me/tiny-ifp"
LINES = """
import json, os, sys
from tests.cli.process import run_here
for token, line in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    done = run_here(*line)
    print(json.dumps([done.returncode, done.stdout, done.stderr]))
"""


@pytest.fixture
def hub() -> Iterator[HubStub]:
    with serve() as stub:
        yield stub


def command_lines(hub: HubStub, home: Path, *lines: tuple[str, list[str | Path]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of command lines, each with its token, in one process whose hub the stub is."""
    given = json.dumps([[token, [str(argument) for argument in line]] for token, line in lines])
    return [tuple(json.loads(line)) for line in hub.client(home, LINES, given).splitlines()]


def test_a_conversion_is_uploaded_and_comes_back_equal(hub: HubStub, tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    (source / CARD).write_text("---\nlicense: apache-2.0\n---\n")
    convert = ["convert", "--model", source, "--mlx-path", out, "--upload-repo", NAME, "--json"]
    ((code, said, complaint),) = command_lines(hub, tmp_path / "up", ("hf_writer", convert))
    assert code == 0, complaint
    assert json.loads(said)["uploaded"] == f"{hub.endpoint}/{NAME}"
    assert f"uploading {out}" in complaint

    checkpoint = Checkpoint.open(out)
    held = hub.repositories[NAME]
    assert set(held) == {*checkpoint.manifest["files"], MANIFEST, CARD, ".gitattributes"}
    assert {name for name, way in hub.ways.items() if way == "lfs"} >= {"priors.safetensors", "tokenizer.json"}
    card = held[CARD].decode()
    assert "license: apache-2.0\n" in card
    assert f"ifprune chat --model {NAME}\n" in card

    # Somebody edits the card on the hub: that is no damage.
    hub.repositories[NAME][CARD] += b"\nMore words.\n"
    generate = ["generate", "--model", NAME, "--prompt", "hi", "--max-tokens", "4", "--json"]
    again = [*convert[:3], "--mlx-path", tmp_path / "second", "--upload-repo", NAME]
    done = command_lines(
        hub, tmp_path / "down", ("", ["info", "--model", NAME, "--json"]), ("", generate), ("hf_writer", again)
    )
    assert [code for code, _, _ in done] == [0, 0, 1], done
    assert json.loads(done[1][1])["completion_tokens"] == 4
    (copy,) = (tmp_path / "down").glob("hub/models--me--tiny-ifp/snapshots/*")
    assert Checkpoint.open(copy).id == checkpoint.id
    assert Checkpoint.open(copy).verify() == []
    # What is there is not overwritten, and this is known before the conversion.
    assert f"{NAME}: exists on the hub and holds files" in done[2][2]
    assert not (tmp_path / "second").exists()


def test_what_cannot_be_uploaded_is_refused_before_the_conversion(hub: HubStub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["convert", "--model", tmp_path / "nothing", "--mlx-path", out, "--upload-repo"]
    cases = {
        "needs a token; log in with `hf auth login`": ("", NAME),
        "the token may only read": ("hf_reader", NAME),
        "the hub does not accept the token": ("hf_stolen", NAME),
        "give OWNER/NAME": ("hf_writer", "tiny-ifp"),
        "no name that the hub allows": ("hf_writer", "me/tiny--ifp"),
        "no such file or folder": ("hf_writer", NAME),  # the next thing that is looked at: the hub had no objection
    }
    done = command_lines(hub, tmp_path / "home", *((token, [*line, name]) for token, name in cases.values()))
    for said, (code, out_text, complaint) in zip(cases, done, strict=True):
        assert (code, out_text, complaint.count("\n")) == (1, "", 1), complaint
        assert said in complaint
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the connection to the hub failed"),
    ],
)
def test_without_a_network(hub: HubStub, tmp_path: Path, changes: dict[str, str], said: str) -> None:
    line = ["convert", "--model", tmp_path / "nothing", "--upload-repo", NAME]
    done = run(*line, cache=tmp_path, env=hub.env(tmp_path, "hf_writer") | changes)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert said in done.stderr


def test_a_failed_upload_leaves_the_checkpoint_and_hf_finishes_it(hub: HubStub, tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    hub.failing["commit"] = 403
    line: list[str | Path] = ["convert", "--model", source, "--mlx-path", out, "--upload-repo", NAME]
    ((code, _, complaint),) = command_lines(hub, tmp_path / "home", ("hf_writer", line))
    assert code == 1
    assert f"the token may not write there; see {hub.endpoint}/settings/tokens" in complaint
    advice = f"hf upload {NAME} {out}"
    assert complaint.endswith(f"upload it again with `{advice}`\n")
    checkpoint = Checkpoint.open(out)
    assert list(hub.repositories[NAME]) == [".gitattributes"]

    # What the message says, with the hub's own command; what was transferred is not sent again.
    hub.failing = {"put": 500}
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    env = environment(tmp_path, **hub.env(tmp_path / "hf", "hf_writer"))
    done = subprocess.run([*hf, *advice.split()[1:]], env=env, check=False, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert set(checkpoint.manifest["files"]) < set(hub.repositories[NAME])


def test_the_card(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "plain", options=Options(density=0.5)))
    card = model_card(checkpoint, "plain")
    assert "base_model" not in card
    assert "license" not in card
    assert "| made from | source-of-plain |" in card
    assert "| selector | activation, density 0.5 unless told otherwise |" in card
    source = "Org/Base-1.5B@0123456789abcdef base.gguf + adapter mine"
    named = replace(checkpoint, manifest=checkpoint.manifest | {"source": source, "licence": "The Licence, version 2"})
    card = model_card(named, "plain")
    assert "base_model: Org/Base-1.5B\n" in card
    assert "license: other\nlicense_name: the-licence-version-2\n" in card
    # The card may be written and changed without the checkpoint becoming another one.
    write_card(checkpoint, "plain").write_text("mine")
    assert Checkpoint.open(checkpoint.path).id == checkpoint.id
