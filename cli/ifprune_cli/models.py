"""`ifprune models`: what lies in the cache of converted models, and its removal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .console import note, result_json, show, size
from .options import JsonOption

_UNUSABLE = "unfinished or outdated"
_WIDTH, _LEAST = 80, 24  # of a line, and of the names, however long what stands after them is


def models(
    remove: Annotated[
        Optional[list[str]],
        typer.Option("--remove", metavar="NAME", help="Remove this model, then list the rest; repeatable."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the converted models in the cache, with their sizes, or remove some."""
    from ifprune_convert.embedded import cache_folder
    from ifprune_convert.model_cache import cached_model, cached_models

    for model in [cached_model(name) for name in remove or ()]:
        freed = model.bytes
        model.remove()
        note(f"removed {model.name}, {size(freed)}")
    found = cached_models()
    if json:
        keys = ("name", "kind", "bytes", "usable")
        result_json({"models": [{key: getattr(one, key) for key in keys} | {"path": str(one.folder)} for one in found]})
        return
    if found:
        sizes = [one.bytes for one in found]
        kinds = [one.kind if one.usable else _UNUSABLE for one in found]
        _show([_at_home(one.name) for one in found], sizes, kinds, f"in {_at_home(str(cache_folder()))}")
    elif not remove:
        note("no models in the cache yet; `ifprune chat --model MODEL` converts one into it")


def _show(names: list[str], sizes: list[int], kinds: list[str], where: str) -> None:
    """A table of 80 columns. A name that is too long keeps its end, by which `--remove` knows it as well."""
    width = min(max(map(len, names)), max(_WIDTH - 2 - 8 - 2 - max(map(len, kinds)), _LEAST))
    for name, count, kind in zip(names, sizes, kinds, strict=True):
        shown = name if len(name) <= width else f"...{name[3 - width :]}"
        show(f"{shown:<{width}}  {size(count):>8}  {kind}")
    total = f"{'total':<{width}}  {size(sum(sizes)):>8}"
    show(f"{total}  {where}" if len(total) + 2 + len(where) <= _WIDTH else total)


def _at_home(path: str) -> str:
    """A path as people write it; any other name as it is."""
    home = str(Path.home())
    return f"~{path.removeprefix(home)}" if path.startswith(f"{home}/") else path
