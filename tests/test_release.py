"""The release: its workflow publishes only what was built and tested, without a secret; the formula names the sdist."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import ifprune_mlx
from scripts.make_formula import formula

ROOT = Path(__file__).parent.parent


@pytest.fixture
def workflow() -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    return loaded


def test_only_a_tag_publishes_and_only_what_was_built_and_tested(workflow: dict[Any, Any]) -> None:
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML takes `on` for true
    jobs = workflow["jobs"]
    assert set(jobs["publish"]["needs"]) == {"build", "test"}
    assert jobs["publish"]["environment"] == "pypi"
    # The job that may publish runs nothing of the repository's.
    assert all("run" not in step for step in jobs["publish"]["steps"])
    assert [name for name, job in jobs.items() if "id-token" in job["permissions"]] == ["publish"]
    assert workflow["permissions"] == {}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


@pytest.mark.parametrize(("tag", "code"), [(f"v{ifprune_mlx.__version__}", 0), ("v99.0", 1), ("v", 1)])
def test_a_tag_must_be_the_version(workflow: dict[Any, Any], tag: str, code: int) -> None:
    (step,) = [step for step in workflow["jobs"]["build"]["steps"] if step.get("name") == "The tag is the version"]
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        cwd=ROOT,
        env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == code


def test_the_formula_is_ruby_and_names_the_sdist(tmp_path: Path) -> None:
    sdist = tmp_path / "ifprune_mlx-1.2.3.tar.gz"
    sdist.write_bytes(b"an sdist")
    made = formula(sdist)
    assert f'sha256 "{hashlib.sha256(b"an sdist").hexdigest()}"' in made
    assert "/ifprune-mlx/ifprune_mlx-1.2.3.tar.gz" in made
    assert re.search(r'"#\{buildpath\}\[server,plots\]"', made)
    with pytest.raises(ValueError, match="no sdist of ifprune-mlx"):
        formula(tmp_path / "other-1.0.tar.gz")
    if (ruby := shutil.which("ruby")) is not None:
        subprocess.run([ruby, "-wc"], input=made.encode(), check=True, capture_output=True)
