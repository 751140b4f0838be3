"""What somebody reads who starts ifprune where it cannot run: one line, whatever else would fail."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ifprune_cli.machine_check import NEWEST, OLDEST

ROOT = Path(__file__).parents[2]
CLI = ROOT / "cli" / "ifprune_cli"
# A Mac as Python sees it. Any import that this process would need from the environment fails.
STAND_IN = """
import platform, runpy, subprocess, sys
sys.version_info = {python}
sys.platform = "darwin"
platform.machine = lambda: {machine!r}
platform.mac_ver = lambda: ({macos!r}, ("", "", ""), {machine!r})
class Done:
    stdout = {sysctl!r}
subprocess.run = lambda *command, **options: Done()
class NoImport:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm", "numpy", "typer", "ifprune_mlx"):
            raise ImportError("no wheel for this machine: " + name)
sys.meta_path.insert(0, NoImport())
sys.path.insert(0, {path!r})
sys.argv = ["ifprune", "demo"]
runpy.run_module("ifprune_cli.main", run_name="__main__", alter_sys=True)
"""
MAC = {"python": (3, 12, 1), "machine": "arm64", "macos": "15.1", "sysctl": b""}
CASES = {
    "Rosetta": ({"machine": "x86_64", "sysctl": b"1\n"}, "runs under Rosetta"),
    "Rosetta and Python 3.9": ({"machine": "x86_64", "sysctl": b"1\n", "python": (3, 9, 6)}, "runs under Rosetta"),
    "Intel": ({"machine": "x86_64"}, "Apple silicon is needed"),
    "macOS 13": ({"macos": "13.6.9"}, "macOS 14 or newer is needed, and this is 13.6.9"),
    "Python 3.9": ({"python": (3, 9, 6)}, f"Python 3.10 to 3.13 is needed, and {sys.executable} is 3.9.6"),
    "Python 3.14": ({"python": (3, 14, 0)}, "Python 3.10 to 3.13 is needed"),
}


def start(**changes: object) -> subprocess.CompletedProcess[str]:
    program = STAND_IN.format(path=str(CLI.parent), **(MAC | changes))
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", CASES)
def test_the_first_line_says_what_is_wrong_and_what_to_do(name: str) -> None:
    changes, said = CASES[name]
    done = start(**changes)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("ifprune: ")
    assert said in line


def test_on_a_mac_that_will_do_the_command_goes_on() -> None:
    assert "no wheel for this machine" in start().stderr


def test_an_old_python_can_read_what_comes_first() -> None:
    """Of Python 3.9 and older the system's own is the commonest."""
    for name, version in (("__init__", (3, 7)), ("machine_check", (3, 7)), ("main", (3, 9))):
        ast.parse((CLI / f"{name}.py").read_text(encoding="utf-8"), feature_version=version)


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9"])
def test_a_real_old_python(version: str) -> None:
    python, env = shutil.which(f"python{version}"), {**os.environ, "PYENV_VERSION": version, "PYTHONPATH": ""}
    if python is None or subprocess.run([python, "-V"], capture_output=True, check=False, env=env).returncode:
        pytest.skip(f"there is no Python {version}")
    commands = [["-I", str(CLI / "machine_check.py")]]
    if version == "3.9":
        commands.append(
            ["-c", f"import sys; sys.path.insert(0, {str(CLI.parent)!r}); import ifprune_cli.main as m; m.main()"]
        )
    for command in commands:
        done = subprocess.run([python, *command], capture_output=True, text=True, check=False, env=env)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert re.search(rf"^ifprune: Python 3.10 to 3.13 is needed, and .* is {version}\.", line)


def test_make_says_it_before_it_installs_anything(tmp_path: Path) -> None:
    """And the versions are those of pyproject.toml."""
    (old := tmp_path / "python").write_text(
        f"#!/bin/sh\nexec {sys.executable} -I -c 'import sys, runpy; sys.version_info = (3, 9, 6); "
        'runpy.run_path(sys.argv[-1], run_name="__main__")\' "$@"\n'
    )
    old.chmod(0o755)
    shutil.copytree(CLI, tmp_path / "cli" / "ifprune_cli")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", f"PYTHON={old}", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ifprune: Python 3.10 to 3.13 is needed")
    assert "make PYTHON=python3.12 demo" in done.stderr.splitlines()[1]
    assert not (tmp_path / ".venv").exists()
    wanted = f'requires-python = ">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"'
    assert wanted in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
