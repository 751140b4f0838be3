"""Imports follow the data flow, one way (DESIGN.md section 4), and nothing that is shipped unpickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "ifprune_mlx": ROOT / "ifprune_mlx",
    "ifprune_convert": ROOT / "convert" / "ifprune_convert",
    "ifprune_cli": ROOT / "cli" / "ifprune_cli",
}
# The modules of `ifprune_mlx`, each of which may import only those before it. A new module takes its place here.
ORDER = (
    "errors",
    "ownership",
    "files",
    "json_lines",
    "selection",
    "topk",
    "families",
    "neuron_layout",
    "checkpoint",
    "task_store",
    "bootstrap",
    "budget",
    "buffers",
    "store",
    "slots",
    "packed",
    "ffn",
    "importance",
    "hub",
    "predictor",
    "model",
    "prompts",
    "history",
    "selection_cache",
    "selectors",
    "generation",
    "session",
    "contender",
    "bench",
    "overlap",
    "plots",
    "tasks",
    "evaluate",
    "doctor",
    "asking",
    "choices",
    "exact",
    "harness",
    "atlas",
)
# The modules of `ifprune_mlx.train`, likewise. They may import anything of ORDER, and nothing of it imports them.
TRAIN = (
    *("records", "encoding", "mixture"),
    *("kernels", "answers", "backbone", "targets", "distill", "priors", "static"),
    *("tuned", "adapter", "full", "recompute", "arms", "run_files", "paired", "watch", "scratch"),
)
# The modules of `ifprune_mlx.serving`, likewise: the engine first, then what speaks HTTP.
SERVING = (
    *("jobs", "stopping", "sampling", "queueing", "prefixes", "lanes", "answering"),
    *("admission", "tickets", "books", "choosing", "switching", "batch", "engine"),
    *("requests", "replies", "tool_calls", "conversations", "limits", "metrics", "openapi", "service", "listening"),
    *("exchange", "openai_api", "anthropic_api", "app"),
)
FILES = sorted((name, file) for name, folder in PACKAGES.items() for file in folder.rglob("*.py"))
# Of the packages themselves; everything that may import them is below them.
MAY_IMPORT = {
    "ifprune_mlx": {"ifprune_mlx"},
    "ifprune_convert": {"ifprune_mlx", "ifprune_convert"},
    "ifprune_cli": {"ifprune_mlx", "ifprune_convert", "ifprune_cli"},
}


def imported(package: str, file: Path, tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too; relative ones made absolute."""
    parts = (package, *file.relative_to(PACKAGES[package]).with_suffix("").parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from . import layout` imports a module, `from .layout import packed` a name from one.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules(package: str, file: Path) -> list[str]:
    return list(imported(package, file, ast.parse(file.read_text(encoding="utf-8"))))


def test_the_order_names_every_module() -> None:
    for name, order in (("", ORDER), ("train", TRAIN), ("serving", SERVING)):
        found = {file.stem for file in (PACKAGES["ifprune_mlx"] / name).glob("*.py")} - {"__init__"}
        assert found == set(order)
        assert len(order) == len(set(order))


@pytest.mark.parametrize("name", ORDER)
def test_a_module_of_the_library_imports_only_what_comes_before_it(name: str) -> None:
    file = PACKAGES["ifprune_mlx"] / f"{name}.py"
    ours = {module.split(".")[1] for module in modules("ifprune_mlx", file) if module.startswith("ifprune_mlx.")}
    allowed = set(ORDER[: ORDER.index(name)])
    assert ours - allowed == set()


@pytest.mark.parametrize(
    ("folder", "order", "name"),
    [(folder, order, name) for folder, order in (("train", TRAIN), ("serving", SERVING)) for name in order],
)
def test_training_and_serving_import_only_the_library_and_what_comes_before(
    folder: str, order: tuple[str, ...], name: str
) -> None:
    names = modules("ifprune_mlx", PACKAGES["ifprune_mlx"] / folder / f"{name}.py")
    parts = [module.split(".") for module in names if module.startswith("ifprune_mlx.")]
    assert {part[1] for part in parts} <= {*ORDER, folder, "__version__"}
    assert {part[2] for part in parts if part[1] == folder} <= set(order[: order.index(name)])


def test_the_runtime_imports_neither_training_nor_serving() -> None:
    files = [file for name, file in FILES if name == "ifprune_mlx" and file.parent == PACKAGES["ifprune_mlx"]]
    assert len(files) == len(ORDER) + 1
    names = {(file.name, module) for file in files for module in modules("ifprune_mlx", file)}
    assert [name for name in names if name[1].startswith(("ifprune_mlx.train", "ifprune_mlx.serving"))] == []


def test_the_engine_knows_no_http() -> None:
    for name in SERVING[: SERVING.index("requests")]:
        names = modules("ifprune_mlx", PACKAGES["ifprune_mlx"] / "serving" / f"{name}.py")
        assert not {module.split(".")[0] for module in names} & {"starlette", "uvicorn"}


@pytest.mark.parametrize(("package", "file"), FILES, ids=[str(file.relative_to(ROOT)) for _, file in FILES])
def test_packages_import_only_those_below_them(package: str, file: Path) -> None:
    ours = {module.split(".")[0] for module in modules(package, file)} & set(PACKAGES)
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize(("package", "file"), FILES, ids=[str(file.relative_to(ROOT)) for _, file in FILES])
def test_nothing_unpickles_and_no_module_is_a_drawer(package: str, file: Path) -> None:
    assert file.stem not in ("utils", "util", "helpers", "common", "misc")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    roots = {module.split(".")[0] for module in imported(package, file, tree)}
    assert not roots & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "torch"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "eval", "exec", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    # Guards the parser above: a mistake there would make every rule pass.
    code = "import pickle\nfrom . import session\nfrom .session import Session\nfrom ifprune_cli import main\n"
    nested = "def f():\n    from ..history import History\n"
    file, deeper = PACKAGES["ifprune_mlx"] / "errors.py", PACKAGES["ifprune_mlx"] / "train" / "loop.py"
    assert list(imported("ifprune_mlx", file, ast.parse(code))) == [
        "pickle",
        "ifprune_mlx.session",
        "ifprune_mlx.session.Session",
        "ifprune_cli.main",
    ]
    assert list(imported("ifprune_mlx", deeper, ast.parse(nested))) == ["ifprune_mlx.history.History"]
