"""Saved chats: every setting comes back, and what the file says of itself costs nothing before it is checked."""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import ChatFileError, Instruction, Selection, SelectionError, Session, TaskError, TaskStore
from ifprune_mlx.selection.selectors import Selected, StaticSelector
from tests.ifprune_mlx.generating import Tiny
from tests.ifprune_mlx.reference import random_selection

WIDTHS = (128, 128)


@pytest.mark.parametrize("selector", ["static", "random", "activation"])
@pytest.mark.parametrize("on_switch", ["reprefill", "keep"])
def test_selector_and_switching_come_back(tiny: Tiny, tmp_path: Path, selector: str, on_switch: str) -> None:
    chat = Session(*tiny, policy="auto", selector=selector, on_switch=on_switch, switch_below=0.25, seed=7, density=0.5)
    chat.ask("One", max_tokens=2)
    chat.save(tmp_path / "chat.json")
    other = Session(*tiny)
    other.load(tmp_path / "chat.json")
    assert other.selector is not None
    assert (other.selector.name, other.on_switch, other.switch_below) == (selector, on_switch, 0.25)
    for one in (chat, other):
        one.reset()
        one.ask("Two", max_tokens=2)
    assert chat.selection is not None
    assert other.selection is not None
    assert chat.selection.hash == other.selection.hash  # the random selector's seed came back too
    other.save(tmp_path / "again.json")
    kept = ("selector", "seed", "on_switch", "switch_below", "policy", "keep")
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("chat.json", "again.json"))
    assert [first[name] for name in kept] == [second[name] for name in kept]


def test_a_chat_of_before_leaves_the_settings_of_the_conversation(tiny: Tiny, tmp_path: Path) -> None:
    Session(*tiny, selector="static").save(tmp_path / "chat.json")
    state = json.loads((tmp_path / "chat.json").read_text())
    for name in ("selector", "seed", "on_switch", "switch_below"):
        del state[name]
    (tmp_path / "chat.json").write_text(json.dumps(state))
    chat = Session(*tiny, selector="random", on_switch="keep", switch_below=0.5)
    chat.load(tmp_path / "chat.json")
    assert chat.selector is not None
    assert (chat.selector.name, chat.on_switch, chat.switch_below) == ("random", "keep", 0.5)


class Mine(StaticSelector):
    """A user's own selector."""

    name = "mine"

    def select(self, instruction: Instruction, keep: Any) -> Selected:
        return super().select(instruction, keep)


def test_a_users_own_selector_is_kept_by_its_name_or_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    own = Mine(tiny[0])
    Session(*tiny, selector=own).save(tmp_path / "chat.json")
    again = Session(*tiny, selector=own)
    again.load(tmp_path / "chat.json")
    assert again.selector is own
    with pytest.raises(ChatFileError, match="was saved with the selector 'mine'"):
        Session(*tiny, selector="static").load(tmp_path / "chat.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"selector": ["static"]},
        {"selector": 3},
        {"on_switch": "forget"},
        {"on_switch": None},
        {"switch_below": "often"},
        {"switch_below": 1e999},
        {"seed": "x"},
        {"seed": 1e999},
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    Session(*tiny, selector="static").save(tmp_path / "chat.json")
    state = json.loads((tmp_path / "chat.json").read_text()) | changes
    (tmp_path / "chat.json").write_text(json.dumps(state))
    chat = Session(*tiny, selector="static", on_switch="keep")
    with pytest.raises(ChatFileError):
        chat.load(tmp_path / "chat.json")
    assert chat.on_switch == "keep"


# Sizes.


def small_mask() -> str:
    return base64.b64encode(bytes([255] * 4)).decode()


@pytest.mark.parametrize("widths", [[128, 6 * 10**8], [6 * 10**8] * 2, [2**31 - 1, 128], [128, 2**40], [128] * 200_000])
def test_a_small_chat_takes_little_memory_whatever_widths_it_names(
    tiny: Tiny, tmp_path: Path, widths: list[int]
) -> None:
    Session(*tiny, selector="static").save(tmp_path / "chat.json")
    state = json.loads((tmp_path / "chat.json").read_text())
    masks = [small_mask()] * min(len(widths), 2)
    state["selection"] = {"selector": "static", "widths": widths, "hash": "0" * 16, "masks": masks}
    (tmp_path / "chat.json").write_text(json.dumps(state))
    tracemalloc.start()
    try:
        with pytest.raises(ChatFileError, match="of another shape"):
            Session(*tiny, selector="static").load(tmp_path / "chat.json")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("width", ["0", "-1", "2147483648", "1" + 30 * "0", "9" * 5000])
def test_a_selection_file_with_an_absurd_width_is_one_line(tiny: Tiny, tmp_path: Path, width: str) -> None:
    store = TaskStore(tiny[0].checkpoint, tmp_path / "data")
    selection = random_selection(WIDTHS, (16, 16), seed=1)
    path = store.save("wide", selection)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["widths"] = f"128 {width}"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(SelectionError) as caught:
        Selection.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(TaskError):
        store.load("wide")
