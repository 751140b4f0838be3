"""Says in one line why ifprune cannot run here; pip merely finds no MLX then.

It imports nothing of the project, whose other files need not even parse here: Python 3.6 can read this one. The
Makefile runs it as a script before anything is installed, with -I: this folder's `select` is not Python's.
"""

import platform
import subprocess
import sys
from typing import Optional

OLDEST, NEWEST = (3, 10), (3, 13)  # as in pyproject.toml
OLDEST_MACOS = 14  # of MLX's wheels


def problem() -> Optional[str]:
    """What is wrong with this machine or this Python, and what to do; None if nothing is."""
    if sys.platform == "darwin":
        macos = platform.mac_ver()[0]
        if platform.machine() != "arm64":
            if _translated():
                return (
                    "this Python runs under Rosetta, and MLX has no Intel build; use one for Apple silicon, such as "
                    "/opt/homebrew/bin/python3, in a terminal that does not run under Rosetta"
                )
            return "a Mac with Apple silicon is needed, and this one has an Intel processor"
        if int(macos.split(".")[0]) < OLDEST_MACOS:
            return f"macOS {OLDEST_MACOS} or newer is needed, and this is {macos}; update macOS"
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        oldest, newest, this = (".".join(map(str, part)) for part in (OLDEST, NEWEST, sys.version_info[:3]))
        return f"Python {oldest} to {newest} is needed, and {sys.executable} is {this}; install another, say 3.12"
    return None


def _translated() -> bool:
    """Whether Rosetta translates this process; an Intel Mac does not know the name."""
    command = ["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return found.stdout.strip() == b"1"


if __name__ == "__main__":
    found = problem()
    sys.exit(None if found is None else "ifprune: " + found)
