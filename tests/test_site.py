"""README, CONTRIBUTING and the documentation site: short enough, whole, and true about what files there are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import ifprune_mlx
from scripts.make_cast import Screen, record, svg
from tests.cli.process import environment

ROOT = Path(__file__).parent.parent
README_LINES, README_WORDS = 150, 1400


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= README_LINES
    assert len(text.split()) <= README_WORDS


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_into_the_repository_lead_to_files(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", read(name))
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert targets
    assert missing == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/guide/convert.md"])
def test_files_that_are_named_exist(name: str) -> None:
    named = re.findall(
        r"(?:ifprune_mlx|convert|cli|tests|scripts|examples|docs)/[\w./-]+\.(?:py|md|svg|jsonl)", read(name)
    )
    assert [path for path in named if not (ROOT / path).exists() and not (ROOT / "docs" / path).exists()] == []


def test_the_tree_of_contributing_exists() -> None:
    """Every file and folder of the tree, and every module of `ifprune_mlx` itself in it."""
    tree = read("CONTRIBUTING.md").split("```text\n")[1].split("```")[0]
    top = Path()
    listed = set()
    for line in tree.splitlines():
        names = re.match(r"[\w./]+(?:, [\w./]+)*", line.strip())
        assert names is not None, line
        for entry in names[0].split(", "):
            path = Path(entry) if line[0] != " " else top / entry
            assert (ROOT / path).exists(), line
            listed.add(path.as_posix())
        if line[0] != " ":
            top = Path(names[0])
    modules = {f"ifprune_mlx/{file.name}" for file in (ROOT / "ifprune_mlx").glob("*.py")} - {"ifprune_mlx/__init__.py"}
    assert modules <= listed


def test_the_api_pages_name_what_is_exported() -> None:
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md"))]
    named = [name for page in pages for name in re.findall(r"^::: ifprune_mlx\.(\S+)$", page, re.MULTILINE)]
    assert sorted(named) == sorted(ifprune_mlx.__all__)


def test_the_site_builds_and_is_whole_without_a_network(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="needs ifprune-mlx[docs]")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT,
        env=environment(tmp_path, NO_MKDOCS_2_WARNING="1"),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout.decode()) == (0, ""), done.stderr.decode()
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {"index.html", "cli.html", "log.html", "guide/embed.html", "api/generate.html"} < set(pages)
    for name, page in pages.items():
        # Links lead where they lead; what a page loads must be its own.
        outside = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?(?:https?:)?//[^ >]*", page)
        outside += re.findall(
            r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)[^>]* href=\"?(?:https?:)?//[^ >]*", page
        )
        assert outside == [], name
    assert "Answer one user message" in pages["api/generate.html"]


def test_a_screen_shows_what_a_terminal_would() -> None:
    screen = Screen(10)
    screen.feed("one\r\ntwo\rT\r\n\x1b[1mbusy\x1b[0m 50%\r\x1b[2Kdone\r\n\x1b[1A\x1b[2Kgone\r\n0123456789ab")
    assert screen.lines == ["one", "Two", "gone", "0123456789", "ab"]


def test_a_cast_is_a_picture_that_ends_with_all_that_was_printed() -> None:
    script = "printf 'first <&>\\nwait'; sleep 0.3; printf '\\rdone\\n'"
    pieces, ticks, heights = record([f'sh -c "{script}"'], columns=60, rows=4, speed=1, longest=1)
    picture = svg(pieces, ticks, heights, columns=60, rows=4, title="a test")
    texts = list(ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text"))
    last = "".join(text.text or "" for text in texts if text.get("visibility") != "hidden")
    assert "first <&>" in last
    assert "done" in last
    assert "wait" not in last.replace(script, "")
    assert any((text.text, text.get("visibility")) == ("wait", "hidden") for text in texts)
