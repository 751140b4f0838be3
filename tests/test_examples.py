"""The examples run as they stand: as processes, on a tiny checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ifprune_mlx import Checkpoint
from tests.cli.process import environment

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, checkpoint: Path, folder: Path) -> str:
    """What an example says, which must end well and complain of nothing."""
    arguments = [sys.executable, str(EXAMPLES / name), str(checkpoint)]
    done = subprocess.run(arguments, env=environment(folder), capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    return done.stdout.decode()


def test_embed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = example("embed.py", tiny_checkpoint, tmp_path)
    assert said.count("\n> ") == said.count("[activation: ") == 2


def test_async_chat(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = example("async_chat.py", tiny_checkpoint, tmp_path)
    assert said.count("\n> ") == 3
    assert said.endswith(" ...\n")


def check_tasks(checkpoint: Path, folder: Path) -> None:
    """The first run saves the task; the second finds it, and says the same on the same selection."""
    first, second = (example("tasks.py", checkpoint, folder) for _ in range(2))
    (file,) = [entry for entry in folder.rglob("*") if entry.is_file()]
    assert file.name == "geography.safetensors"
    saved, _, rest = first.partition("\n")
    assert saved == f"saved to {file}"
    figures = re.compile(r"selected in [0-9.]+ ms, switched in [0-9]+ ms")
    assert figures.sub("", rest) == figures.sub("", second)
    assert len(set(re.findall(r"selection ([0-9a-f]{16})", first))) == 1
    # Looking the selection up is all that selecting takes.
    assert all(float(took) < 50 for took in re.findall(r"selected in ([0-9.]+) ms", first))


def test_tasks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    check_tasks(tiny_checkpoint, tmp_path)


@pytest.mark.real
def test_tasks_on_the_embedded_model(smollm2: Path, tmp_path: Path) -> None:
    check_tasks(smollm2, tmp_path)


NOTEBOOK = EXAMPLES / "notebook.ipynb"


def run_notebook(checkpoint: Path, folder: Path) -> str:
    """What the notebook's cells print, run from top to bottom in a kernel of its own."""
    pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    # Jupyter's own event loop and deprecation warnings are not ours: it runs in a process of its own.
    code = (
        "import sys, nbformat; from nbclient import NotebookClient; "
        "notebook = nbformat.read(sys.argv[1], 4); NotebookClient(notebook, timeout=240).execute(); "
        "outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]; "
        "print(''.join(output.text for output in outputs if output.get('name') == 'stdout'))"
    )
    jupyter = {name: str(folder / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    env = environment(folder, IFPRUNE_MODEL=str(checkpoint), **jupyter)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(NOTEBOOK)],
        env=env,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_the_notebook(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = run_notebook(tiny_checkpoint, tmp_path)
    layers = len(Checkpoint.open(tiny_checkpoint).layout.ffns)
    assert len(re.findall(r"^ +[0-9]+ [01]\.[0-9]{2} #", said, re.MULTILINE)) == layers
    assert [float(x) for x in re.findall(r"^density ([0-9.]+), [0-9,]+ active", said, re.MULTILINE)] == [1.0, 0.75, 0.5]


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.real
def test_the_notebook_on_the_embedded_model(smollm2: Path, tmp_path: Path) -> None:
    said = run_notebook(smollm2, tmp_path)
    assert said.startswith("134,515,008 parameters in 30 layers\n")
    mean = re.search(r"^mean ([0-9.]+), agreement", said, re.MULTILINE)
    assert mean is not None
    assert 0.5 < float(mean[1]) < 0.99  # alike, since the prior is common to both, and not the same
