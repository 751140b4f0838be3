"""docs/cli.md says what the commands say: it is made from them, whatever the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cli.process import environment

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "make_cli_reference.py"
PRINT = "import runpy, sys; sys.stdout.write(runpy.run_path(sys.argv[1])['reference']())"


def test_the_reference_is_what_the_script_makes(tmp_path: Path) -> None:
    terminal = {"COLUMNS": "40", "TERMINAL_WIDTH": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    made = subprocess.run(
        [sys.executable, "-c", PRINT, str(SCRIPT)],
        env=environment(tmp_path, **terminal),
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    assert "\x1b" not in made
    assert made == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), "run: python scripts/make_cli_reference.py"


def test_every_command_and_option_stands_in_it() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in ("chat", "generate", "convert", "export", "select", "tasks", "info", "train", "bench", "evaluate"):
        assert f"\n## {name}\n" in text
    for option in ("--upload-repo OWNER/NAME", "--selector learned\\|activation\\|static\\|random", "--q-bits INT"):
        assert f"`{option}`" in text or f"{option}`" in text
