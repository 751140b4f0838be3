"""Every code block of README.md and of docs/*.md runs, or says in a comment before it why it cannot.

`<!-- not run: why -->` before a block leaves it out. Blocks in other languages than Python and shell are shown, not
run, and every block names its language. docs/log.md is left out: it records what was run once, on data and for hours
that no test has. Models are tiny: the embedded one lies in the cache already, the hub is a stub on this machine, and
options that `block_runner` adds bound the time; nothing else differs from what a reader does.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert import embedded
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from tests.hub_stub import HubStub, serve
from tests.tiny import write_checkpoint, write_source

ROOT = Path(__file__).parent.parent
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "log.md"})
RUN = {"python": "python", "sh": "shell", "bash": "shell"}
SHOWN = {"text", "json", "yaml", "toml", "swift"}
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)
_REASON = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its line in the page, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    reason: str | None


def blocks(page: str) -> Iterator[Block]:
    """The code blocks of a page, in order."""
    for match in _FENCE.finditer(page):
        reason = _REASON.search(page[: match.start()])
        indent = match["indent"]
        text = "\n".join(line.removeprefix(indent) for line in match["text"].split("\n"))
        line = page[: match.start()].count("\n") + 1
        yield Block(match["language"].strip(), text, line, reason[1] if reason else None)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStub]:
    folder = tmp_path_factory.mktemp("hub")
    with serve() as stub:
        stub.add("Qwen/Qwen2.5-1.5B-Instruct", write_source(folder / "qwen", "qwen2"))
        stub.add("owner/name", write_checkpoint(folder / "name"))
        yield stub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has before the first block: models and files under the names that the pages use."""
    home = tmp_path_factory.mktemp("reader")
    source = write_source(home / "path" / "to" / "source", max_position_embeddings=1024)
    convert(open_source(source), home / "my-model", Options())
    short = "f16" if mx.default_device() == mx.gpu else "f32"
    for base in ("", "-base"):
        name = f"smollm2-135m-instruct{base}-{short}-r{embedded._REVISION}"
        shutil.copytree(home / "my-model", home / "ifprune" / name)
    for domain in ("code", "maths", "general"):
        asked = [f"{domain} {n}?" for n in range(24)]
        chats = [{"prompt": text, "completion": f"Yes, {text}"} for text in asked]
        (home / f"{domain}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    choices = [{"query": f"Is {n} even?", "choices": ["yes", "no"], "gold": n % 2} for n in range(6)]
    (home / "arc.jsonl").write_text("".join(json.dumps(one) + "\n" for one in choices))
    sums = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(6)]
    (home / "gsm8k.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sums))
    return home


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_blocks_of_a_page_run(page: Path, hub: HubStub, folder: Path, tmp_path: Path) -> None:
    found = list(blocks(page.read_text(encoding="utf-8")))
    unknown = [(block.line, block.language) for block in found if block.language not in {*RUN, *SHOWN}]
    assert not unknown, f"{page.name}: name the language of these blocks, one of {sorted({*RUN, *SHOWN})}: {unknown}"
    chosen = [(RUN[one.language], one.text, one.line) for one in found if one.language in RUN and one.reason is None]
    if not chosen:
        return
    if any(text.startswith("ifprune serve") for _, text, _ in chosen):
        for module in ("starlette", "uvicorn"):
            pytest.importorskip(module, reason="needs ifprune-mlx[server]")
    home = tmp_path / "home"
    shutil.copytree(folder, home)
    if any("--mlx-path my-model" in block.text for block in found):
        shutil.rmtree(home / "my-model")  # the page makes it
    code = f"import os; os.chdir({str(home)!r}); from tests.block_runner import main; main()"
    said = hub.client(home, code, json.dumps(chosen), token="hf_writer")
    results = [json.loads(line) for line in said.splitlines()]
    assert [result["wrong"] for result in results if result["wrong"]] == [], f"{page.name}, line {results[-1]['line']}"
    assert len(results) == len(chosen)


def test_few_blocks_are_left_out() -> None:
    every = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8")) if block.language in RUN]
    left_out = [block for block in every if block.reason is not None]
    assert len(every) > 30
    assert len(left_out) <= len(every) / 4


def test_blocks_are_found_with_their_reasons() -> None:
    page = (
        "a\n\n```sh\nx \\\n  y # z\n```\n\n<!-- not run: it is\nlong -->\n```python\n1\n```\n"
        "- b\n\n  ```text\n  c\n  ```\n"
    )
    assert list(blocks(page)) == [
        Block("sh", "x \\\n  y # z\n", 3, None),
        Block("python", "1\n", 10, "it is\nlong"),
        Block("text", "c\n", 15, None),
    ]
