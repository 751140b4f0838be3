"""What `import ifprune_mlx` gives is decided, not accidental."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import ifprune_mlx

EXPORTS = [
    "BudgetError",
    "ChatFileError",
    "Checkpoint",
    "CheckpointError",
    "DataError",
    "GenerationResponse",
    "GrammarError",
    "History",
    "IfpruneError",
    "Instruction",
    "Model",
    "ModelBusyError",
    "PredictorError",
    "PromptError",
    "Selected",
    "Selection",
    "SelectionError",
    "Selector",
    "Session",
    "SourceError",
    "SparsityPredictor",
    "Stats",
    "Switch",
    "Task",
    "TaskError",
    "TaskStore",
    "generate",
    "load",
    "make_selector",
    "stream_generate",
]


def test_exports_are_pinned() -> None:
    assert ifprune_mlx.__all__ == EXPORTS
    assert all(getattr(ifprune_mlx, name).__module__.startswith("ifprune_mlx.") for name in EXPORTS)


def test_every_export_is_documented() -> None:
    assert [name for name in EXPORTS if not (getattr(ifprune_mlx, name).__doc__ or "").strip()] == []


def test_every_error_is_an_ifprune_error() -> None:
    errors = [getattr(ifprune_mlx, name) for name in EXPORTS if name.endswith("Error")]
    assert len(errors) == 12
    assert all(issubclass(error, ifprune_mlx.IfpruneError) for error in errors)


def test_the_version_is_that_of_the_package() -> None:
    assert ifprune_mlx.__version__ == version("ifprune-mlx")


def test_importing_prints_nothing_writes_nothing_and_needs_no_converter(tmp_path: object) -> None:
    code = (
        "import random, sys; state = random.getstate(); import ifprune_mlx; assert random.getstate() == state; "
        "assert not [m for m in sys.modules if m.split('.')[0] in ('ifprune_convert', 'ifprune_cli', 'torch')]"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=str(tmp_path), check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_looking_at_a_checkpoint_does_not_import_mlx_lm() -> None:
    code = (
        "import sys, ifprune_mlx; ifprune_mlx.Checkpoint; "
        "sys.exit(any(name in sys.modules for name in ('mlx_lm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(ifprune_mlx, "nonesuch")
    assert set(ifprune_mlx.__all__) <= set(dir(ifprune_mlx))
