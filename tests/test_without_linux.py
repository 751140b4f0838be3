"""The disguise of `make test-without-linux` hides what it says, and the product works under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.process import environment, run

DISGUISE = str(Path(__file__).parent / "disguise")
TRIAL = Path(__file__).parents[1] / "convert" / "ifprune_convert" / "tokenizer_trial.py"
LOOK = """
import os, resource
from pathlib import Path
for path in ("/proc/self/statm", "/proc/../proc/self/statm", Path("/proc/meminfo"), b"/proc/stat"):
    for read in (open, lambda name: os.open(name, os.O_RDONLY)):
        try:
            read(path)
        except FileNotFoundError:
            print("hidden")
names = [name for module in (os, resource) for name in dir(module)]
print([name for name in names if name.startswith(("posix_fadvise", "POSIX_FADV", "RLIMIT"))])
"""


def hidden(folder: Path, **changes: str) -> dict[str, str]:
    env = environment(folder, IFPRUNE_TEST_HIDE_LINUX="1", **changes)
    env.pop("LD_PRELOAD", None)
    return env | {"PYTHONPATH": os.pathsep.join([DISGUISE, env["PYTHONPATH"]])}


def python(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_what_only_linux_has_is_hidden(tmp_path: Path) -> None:
    assert python(LOOK, hidden(tmp_path)).stdout.splitlines() == ["hidden"] * 8 + ["['RLIMIT_NOFILE']"]


def test_commands_do_without(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ("generate", "--model", tiny_checkpoint, "--prompt", "a", "-m", "4", "--json", "--selector", "static")
    texts = []
    for env in (hidden(tmp_path), {}):
        done = run(*given, "--residency", "ssd", cache=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(done.stdout)["text"])
    assert texts[0] == texts[1]
    shown = python("from ifprune_mlx.bench.process_memory import resident; print(resident())", hidden(tmp_path))
    assert 10**7 < int(shown.stdout) < 10**10, shown.stderr


def test_strangers_tokenizers_are_tried_without(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # The real child ignores PYTHONPATH, and with it the disguise.
    program = (
        f"import runpy, sys; sys.argv = ['x', {str(tiny_checkpoint / 'tokenizer.json')!r}]; "
        f"runpy.run_path({str(TRIAL)!r}, run_name='__main__')"
    )
    done = python(program, hidden(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_schemas_are_tried_without(tmp_path: Path) -> None:
    program = (
        "from ifprune_mlx.constraint import json_rule, _TRIAL; import subprocess, sys; "
        "rule = 'start: answer\\nanswer: ' + json_rule({'type': 'integer'}); "
        "done = subprocess.run([sys.executable, '-c', _TRIAL], input=rule.encode(), check=True, capture_output=True); "
        "print(done.stdout)"
    )
    done = python(program, hidden(tmp_path))
    assert done.stdout == "b''\n", done.stderr


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_device_of_the_tests_is_set_before_anything_computes(tmp_path: Path, device: str) -> None:
    """Where MLX has no GPU it says so, which shows that it was asked."""
    done = python("import mlx.core as mx; print(mx.default_device())", hidden(tmp_path, IFPRUNE_TEST_DEVICE=device))
    assert f"({device}, 0)" in done.stdout or "gpu" in done.stderr


def test_float32_is_float32_in_tests_and_in_what_they_start(tmp_path: Path) -> None:
    done = python("import os; print(os.environ['MLX_ENABLE_TF32'])", environment(tmp_path))
    assert done.stdout == "0\n"
