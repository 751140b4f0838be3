"""Writing what describes an IFP checkpoint: its section of `config.json`, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ifprune_mlx.checkpoint.atomic_write import sha256_file
from ifprune_mlx.checkpoint.format import FORMAT_VERSION, MANIFEST, SECTION, Layout
from ifprune_mlx.checkpoint.regular_file import read_json_object


def write_config(folder: Path, config: Mapping[str, Any], layout: Layout) -> None:
    """Write `config.json` with the layout as its section."""
    text = json.dumps({**config, SECTION: layout.to_dict()}, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def change_section(folder: Path, layout: Layout) -> None:
    """Replace the section of a checkpoint's config, and the config's entry in the manifest, by new files.

    The folder is one that nobody has opened: there are moments when the two do not belong together.
    """
    config = read_json_object(folder / "config.json")
    manifest = read_json_object(folder / MANIFEST)
    for name in ("config.json", MANIFEST):
        (folder / name).unlink()  # either may be a link to a file of another checkpoint
    write_config(folder, config, layout)
    file = folder / "config.json"
    manifest["files"]["config.json"] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write_manifest(folder: Path, *, source: str, licence: str | None, hashed: bool = True) -> None:
    """Write `manifest.json`: size and sha256 of every file in `folder`, versions, source and licence.

    Args:
        hashed: False leaves every sha256 empty, for a folder that is opened before it is complete.
    """
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256_file(file) if hashed else ""}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("ifprune-mlx", "mlx", "mlx-lm")},
        "source": source,
        "licence": licence,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
