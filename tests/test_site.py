"""The documentation site: it builds without a warning, loads nothing from outside, and names every export."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ifprune_mlx
from tests.cli.process import environment

ROOT = Path(__file__).parent.parent


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
