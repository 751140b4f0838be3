"""IFP checkpoints from the hub: the real client against a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ifprune_mlx import Checkpoint
from ifprune_mlx.checkpoint.hub import Room, _shortage, is_hub_id, resolve
from ifprune_mlx.device import this_device
from tests.hub_stub import HubStub, serve

# Resolves each name that it is given, and prints the folder or the message, and what progress was told.
RESOLVE = """
import json, sys
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.checkpoint.hub import resolve

def answer(name):
    told = []
    try:
        found = str(resolve(*name.split("@"), progress=lambda *given: told.append(given)))
    except IfpruneError as exc:
        found = "refused: " + str(exc)
    return found, told

print(json.dumps([answer(name) for name in sys.argv[1:]]))
"""


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[HubStub]:
    with serve() as stub:
        stub.add("org/tiny", tiny_checkpoint)
        stub.repositories["org/tiny"] |= {"run.py": b"", "optimizer.pt": b"pickle", "predictor/x.bin": b"pickle"}
        yield stub


def answers(hub: HubStub, home: Path, *names: str) -> list[tuple[str, list[tuple[int, int]]]]:
    found = json.loads(hub.client(home, RESOLVE, *names))
    return [(text, [(done, total) for done, total in told]) for text, told in found]


def test_a_checkpoint_of_the_hub(hub: HubStub, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (first, told), (second, nothing) = answers(hub, tmp_path, "org/tiny", "org/tiny@main")
    files = {str(file.relative_to(tiny_checkpoint)) for file in tiny_checkpoint.rglob("*") if file.is_file()}
    assert sorted(hub.fetched()) == sorted(files)
    assert Checkpoint.open(Path(first)).verify() == []
    assert second == first
    assert nothing == []
    size = sum((tiny_checkpoint / file).stat().st_size for file in files)
    assert told == sorted(told)
    assert told[-1] == (size, size)
    assert {total for _, total in told} == {size}
    hub.repositories.clear()  # the hub answers, but no longer knows it
    assert answers(hub, tmp_path, "org/tiny")[0][0] == first


def test_what_is_no_checkpoint_costs_no_download(hub: HubStub, tmp_path: Path) -> None:
    tiny = hub.repositories["org/tiny"]
    hub.repositories |= {
        "org/dense": {"config.json": b"{}", "model.safetensors": b""},
        "org/huge": tiny,
        "org/long": tiny,
        "org/gated": tiny,
    }
    hub.sizes["org/huge", "priors.safetensors"] = 10**18
    hub.sizes["org/long", "manifest.json"] = 10**18
    hub.gated.add("org/gated")
    cases = {
        "org/dense": "no IFP checkpoint yet (it has no manifest.json); `ifprune chat --model org/dense` converts it",
        "org/huge": "with residency ram 1000000000.0 GB of its weights would stay in memory, nothing was downloaded",
        "org/long": "free, and 1000000.0 TB to download",
        "org/gated": "its owner has to grant access",
        "org/missing": "no such folder here, and no such repository on the hub",
        "org/tiny@v9": "has no revision 'v9'",
    }
    for (name, words), (text, _) in zip(cases.items(), answers(hub, tmp_path, *cases), strict=True):
        assert text.startswith(f"refused: {name.split('@')[0]}: ")
        assert words in text
        assert "\n" not in text
    assert hub.fetched() == []


def test_padding_is_no_reason_to_refuse_but_only_where_there_is_some(hub: HubStub, tmp_path: Path) -> None:
    """Files a little larger than memory: its config says whether they are padded, and is all that is fetched."""
    hub.repositories["org/large"] = hub.repositories["org/tiny"]
    name = next(file for file in hub.repositories["org/tiny"] if file.startswith("neurons-"))
    hub.sizes["org/large", name] = int(1.1 * this_device().usable)
    ((text, _),) = answers(hub, tmp_path, "org/large")
    assert text.startswith("refused: org/large: with residency ram ")
    assert text.endswith("; this fits: ifprune chat --model org/large --selector static --residency ssd")
    assert hub.fetched() == ["config.json"]


def test_a_damaged_download_is_found_and_comes_again(hub: HubStub, tmp_path: Path) -> None:
    good = hub.repositories["org/tiny"]
    name = next(file for file in good if file.startswith("neurons-"))
    hub.repositories["org/tiny"] = good | {name: good[name][:-1] + bytes([good[name][-1] ^ 1])}
    ((text, _),) = answers(hub, tmp_path, "org/tiny")
    assert f"org/tiny: {name} came damaged and was removed" in text
    hub.repositories["org/tiny"] = good
    ((text, _),) = answers(hub, tmp_path, "org/tiny")
    assert Checkpoint.open(Path(text)).verify() == []


def test_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for text in ("org/name", "./org/other", "/org/other", "a/b/c", "name"):
        assert resolve(text) == Path(text)
    assert is_hub_id("Org-1/Name_2.5-B")
    assert not any(map(is_hub_id, ("", "a", "a/", "/a", "./a", "a/b/c", "a/b:c", "-a/b", "a /b")))


def test_room_is_counted_by_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert _shortage([Room("to download", tmp_path / "not" / "yet", free // 2)]) is None
    half = [Room(what, tmp_path / what, free * 2 // 3) for what in ("to download", "to write")]
    assert _shortage(half[:1]) is None
    words = _shortage(half)
    assert words is not None
    assert "to download" in words
    assert "to write" in words
