"""Runs the scripts beside this file in an interpreter that has PyTorch: `IFPRUNE_TORCH_PYTHON`, by default this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_torch(script: str, package: str, arguments: list[str], given: str = "") -> None:
    """Run a script; skips the test where the interpreter does not have `package` and torch.

    Args:
        given: its standard input.
    """
    python = os.environ.get("IFPRUNE_TORCH_PYTHON", sys.executable)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    env["HF_HUB_OFFLINE"] = "1"
    found = subprocess.run([python, "-c", f"import torch, {package}"], check=False, capture_output=True, env=env)
    if found.returncode:
        pytest.skip(f"torch and {package} are not installed (pip install them, or set IFPRUNE_TORCH_PYTHON)")
    command = [python, str(Path(__file__).with_name(script)), *arguments]
    subprocess.run(command, check=True, input=given.encode(), env=env)
