"""Imports follow the data flow, one way (docs/architecture.md), and nothing that is shipped unpickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "ifprune_mlx": ROOT / "ifprune_mlx",
    "ifprune_convert": ROOT / "convert" / "ifprune_convert",
    "ifprune_cli": ROOT / "cli" / "ifprune_cli",
}
# Packages and modules of `ifprune_mlx`, and modules within a package. Each imports only what stands before it; imports
# for annotations alone (`if TYPE_CHECKING`) do not count.
ORDER = (
    "errors",
    "slow_paths",
    "device",
    "detokenizer",
    "chat_sandbox",
    "tokenizer",
    "thinking",
    "model_lock",
    "checkpoint",
    "sparse",
    "parallel",
    "prompt_cache",
    "selection",
    "model",
    "chat_template",
    "constraint",
    "generation",
    "session",
    "data",
    "eval",
    "bench",
    "train",
    "serving.engine",
    "serving.http",
)
MAY_IMPORT = {
    "ifprune_mlx": {"ifprune_mlx"},
    "ifprune_convert": {"ifprune_mlx", "ifprune_convert"},
    "ifprune_cli": {"ifprune_mlx", "ifprune_convert", "ifprune_cli"},
}
FILES = sorted((name, file) for name, folder in PACKAGES.items() for file in folder.rglob("*.py"))
MOST_MODULES = 14


def module_name(package: str, file: Path) -> str:
    parts = (package, *file.relative_to(PACKAGES[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node` but for those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_run_time(child)


def imported(package: str, file: Path, tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too; relative ones made absolute."""
    parts = (package, *file.relative_to(PACKAGES[package]).with_suffix("").parts)
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from . import layout` imports a module, `from .layout import packed` a name from one.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports() -> dict[tuple[str, Path], list[str]]:
    return {
        (package, file): list(imported(package, file, ast.parse(file.read_text(encoding="utf-8"))))
        for package, file in FILES
    }


def layer(module: str) -> int | None:
    """Where a module of `ifprune_mlx` stands in ORDER; None for what is not one."""
    name = module.removeprefix("ifprune_mlx.")
    return next((i for i, known in enumerate(ORDER) if name == known or name.startswith(f"{known}.")), None)


def test_every_module_has_its_place_and_imports_only_what_comes_before_it() -> None:
    wrong = []
    for (package, file), names in imports().items():
        module = module_name(package, file)
        if package != "ifprune_mlx" or module in ("ifprune_mlx", "ifprune_mlx.serving"):
            continue
        own = layer(module)
        assert own is not None, f"{module} has no place in ORDER"
        found = {name: layer(name) for name in names if name.startswith("ifprune_mlx.")}
        wrong += [f"{module} imports {name}" for name, place in found.items() if place is not None and place > own]
    assert wrong == []


def test_modules_of_one_package_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module_name(package, file): {name.rsplit(".", 1)[0] for name in names if name.startswith("ifprune_")}
        for (package, file), names in imports().items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in graph.get(module, ()):
                if name != module:
                    visit(name, (*path, module))
            done.add(module)

    for module in graph:
        if module != "ifprune_mlx":  # its names are imported when they are first used
            visit(module, ())


def test_packages_import_only_those_below_them() -> None:
    for (package, file), names in imports().items():
        assert {name.split(".")[0] for name in names} & set(PACKAGES) <= MAY_IMPORT[package], file


def test_the_engine_speaks_no_http() -> None:
    for (package, file), names in imports().items():
        if "serving/engine" in file.as_posix():
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"fastapi", "starlette", "uvicorn", "pydantic"}, (package, file)


def test_no_folder_holds_more_modules_than_a_reader_can_hold_in_mind() -> None:
    for folder in {file.parent for package, file in FILES if package == "ifprune_mlx"}:
        modules = [file.stem for file in folder.glob("*.py") if file.stem != "__init__"]
        assert len(modules) <= MOST_MODULES, (folder, modules)


def test_nothing_unpickles_and_no_module_is_a_drawer() -> None:
    for package, file in FILES:
        assert file.stem not in ("utils", "util", "helpers", "common", "misc")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        roots = {module.split(".")[0] for module in imported(package, file, tree)}
        assert not roots & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "torch"}, file
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "eval", "exec", "__import__"}, file
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False


def test_no_error_hides_its_cause() -> None:
    for _, file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant):
                raise AssertionError(f"{file}:{node.lineno}: from None; the command line hides causes by itself")


def test_the_rules_see_what_they_forbid() -> None:
    # Guards the parser above: a mistake there would make every rule pass.
    code = "import pickle\nfrom . import session\nfrom .session import Session\nfrom ifprune_cli import main\n"
    nested = "def f():\n    from ..prompt_cache import History\n"
    hidden = "if TYPE_CHECKING:\n    from ..model import Model\n"
    file, deeper = PACKAGES["ifprune_mlx"] / "errors.py", PACKAGES["ifprune_mlx"] / "train" / "loop.py"
    assert list(imported("ifprune_mlx", file, ast.parse(code))) == [
        "pickle",
        "ifprune_mlx.session",
        "ifprune_mlx.session.Session",
        "ifprune_cli.main",
    ]
    assert list(imported("ifprune_mlx", deeper, ast.parse(nested + hidden))) == ["ifprune_mlx.prompt_cache.History"]
    assert layer("ifprune_mlx.serving.http.app") == len(ORDER) - 1
    assert layer("ifprune_mlx.nonesuch") is None
