"""Finds a checkpoint: a folder on disk, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

# Our own patterns: mlx-lm's would leave out `neurons-*.safetensors` and the predictor's folder.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "predictor/*", "tasks/*.safetensors"]


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a hub id (`owner/name`) that is no local path is downloaded first.

    Raises:
        CheckpointError: if it is neither, or the hub cannot be reached.
    """
    path = Path(path_or_repo).expanduser()
    repo = str(path_or_repo)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith((".", "/")):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS))
    except LocalEntryNotFoundError:
        reason = "no such folder here, and the hub cannot be reached"
    except HFValidationError as exc:
        reason = str(exc).splitlines()[0]
    except HfHubHTTPError as exc:
        reason = f"no such folder here, and the hub answered: {str(exc).splitlines()[0]}"
    except OSError as exc:
        reason = f"no such folder here, and the download failed ({exc})"
    raise CheckpointError(f"{repo}: {reason}; give a local IFP checkpoint, or check the name and the connection")
