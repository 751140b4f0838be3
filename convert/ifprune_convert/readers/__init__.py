"""Opens a dense checkpoint, whatever its format.

What lies on disk decides which reader opens it. What none of them reads is refused.
"""

from __future__ import annotations

from pathlib import Path

from ifprune_convert.source import Source
from ifprune_mlx.checkpoint.hub import PICKLES
from ifprune_mlx.errors import SourceError, reason_of

__all__ = ["open_source"]

_PICKLE_REASON = (
    "weights in this format are Python pickles, which can run code when read, so they are never opened; "
    "use the model's safetensors or GGUF version"
)


def open_source(path: Path, *, trust_remote_code: bool = False) -> Source:
    """Open a GGUF file, or a folder with config.json and *.safetensors, for conversion.

    Reads headers, config and tokenizer metadata only; tensors are read one by one by `Source.take`.

    Args:
        path: a file or folder on this machine; symbolic links are followed.
        trust_remote_code: changes only the words with which a folder that needs its own Python code is refused.

    Raises:
        SourceError: in one line, if this is not a dense checkpoint that can be converted.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path, trust_remote_code)
        if path.is_file():
            return _open_file(path)
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read ({reason_of(exc)}); check its permissions") from exc
    if path.exists():
        raise SourceError(f"{path}: is no ordinary file; give a GGUF file, or a folder of safetensors")
    raise SourceError(
        f"{path}: no such file or folder; a model of the hub is named by its id, ORG/NAME, "
        "or by the folder that `hf download` put it into"
    )


def _open_file(path: Path) -> Source:
    if path.suffix.lower() in PICKLES:
        raise SourceError(f"{path}: {_PICKLE_REASON}")
    with path.open("rb") as file:
        magic = file.read(4)
    # A file in the hub's cache carries no suffix, so the magic alone is enough.
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        from .gguf import GGUFSource

        return GGUFSource(path)
    if path.suffix.lower() == ".safetensors":
        raise SourceError(f"{path}: is one file of a model; pass the folder that holds it and its config.json")
    raise SourceError(f"{path}: not a checkpoint; pass a .gguf file, or a folder with config.json and *.safetensors")


def _open_folder(path: Path, trust_remote_code: bool) -> Source:
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    suffixes = {Path(name).suffix.lower() for name in names}
    if ".safetensors" in suffixes:
        if "config.json" not in names:
            raise SourceError(f"{path}: has *.safetensors but no config.json; download the model's config.json into it")
        from .safetensors import SafetensorsSource

        return SafetensorsSource(path, trust_remote_code=trust_remote_code)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        raise SourceError(f"{path}: holds GGUF files; pass one of them, e.g. {path / ggufs[0]}")
    if suffixes & PICKLES:
        raise SourceError(f"{path}: {_PICKLE_REASON}")
    raise SourceError(f"{path}: no weights here; pass a folder with config.json and *.safetensors, or a .gguf file")
