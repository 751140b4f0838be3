"""`ifprune models`: what lies in the cache of converted models, and its removal."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .console import gigabytes, note, result_json, show
from .options import JsonOption

_UNUSABLE = ", unfinished or of another version"


def models(
    remove: Annotated[
        Optional[list[str]],
        typer.Option("--remove", metavar="NAME", help="Remove this model, then list the rest; repeatable."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the converted models in the cache, with their sizes, or remove some."""
    from ifprune_convert.model_cache import cached_model, cached_models

    for model in [cached_model(name) for name in remove or ()]:
        size = model.bytes
        model.remove()
        note(f"removed {model.name}, {gigabytes(size)}")
    found = cached_models()
    if json:
        keys = ("name", "kind", "bytes", "usable")
        result_json({"models": [{key: getattr(one, key) for key in keys} | {"path": str(one.folder)} for one in found]})
        return
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        show(f"{one.name:<{width}}  {gigabytes(one.bytes):>9}  {one.kind}{'' if one.usable else _UNUSABLE}")
    if not found and not remove:
        note("no models in the cache yet; `ifprune chat --model MODEL` converts one into it")
