"""Puts an IFP checkpoint into a repository of the Hugging Face hub.

Only into a new or an empty repository: what is on the hub is never overwritten. The transfer is the hub client's own.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

from ifprune_mlx.checkpoint.format import MANIFEST, Checkpoint
from ifprune_mlx.checkpoint.hub import hub_failure, is_hub_id
from ifprune_mlx.errors import IfpruneError, SourceError

from .card import CARD, write_card

# What the hub itself puts into a new repository, and what its "create" page offers to put there.
_EMPTY = (".gitattributes", CARD, "LICENSE*")


def check_upload(name: str) -> None:
    """Ask the hub, before the long work, whether a checkpoint may be uploaded to `name`, `OWNER/NAME`.

    Raises:
        SourceError: if nobody is logged in, the token may not write, the repository holds files already, or the hub
            cannot be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if not is_hub_id(name):
        raise SourceError(f"--upload-repo {name}: is not the name of a repository; give OWNER/NAME")
    api = HfApi()
    try:
        access = (api.whoami().get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise SourceError(
                f"{name}: the token may only read; make one that may write at {constants.ENDPOINT}/settings/tokens, "
                "and log in with `hf auth login`"
            )
        files = [sibling.rfilename for sibling in api.model_info(name).siblings or []]
    except RepositoryNotFoundError:
        return
    except IfpruneError:
        raise
    except Exception as exc:  # the client's HTTP library, and with it its errors, depend on the client's version
        raise SourceError(f"{name}: {_reason(exc)}") from exc
    if any(not any(fnmatch(file, pattern) for pattern in _EMPTY) for file in files):
        raise SourceError(
            f"{name}: exists on the hub and holds files, which are not overwritten; choose another name, or delete "
            f"them at {constants.ENDPOINT}/{name}/settings"
        )


def upload(checkpoint: Checkpoint, name: str) -> str:
    """Upload a checkpoint to `name`, which is made if it does not exist, and write its model card for that name.

    Returns:
        The repository's page.

    Raises:
        SourceError: if it fails. The checkpoint stays, and the message says how to try again; what was transferred
            is not transferred again.
    """
    write_card(checkpoint, name)
    try:
        return upload_files(checkpoint.path, name, [*checkpoint.manifest["files"], MANIFEST, CARD], "IFP checkpoint")
    except SourceError as exc:
        raise SourceError(
            f"{exc}. The checkpoint is complete; upload it again with `hf upload {name} {checkpoint.path}`"
        ) from exc


def upload_files(folder: Path, name: str, files: list[str], message: str) -> str:
    """Upload files of a folder, by their patterns, to `name`, which is made if it does not exist.

    On a terminal the hub's client shows its progress bars.

    Args:
        message: of the commit.

    Returns:
        The repository's page.

    Raises:
        SourceError: if it fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        page = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=files,
            commit_message=message,
        )
    except Exception as exc:  # as in `check_upload`
        raise SourceError(f"{name}: {_reason(exc)}") from exc
    return page


def _reason(exc: Exception) -> str:
    """What went wrong, in one line, with what to do."""
    from huggingface_hub import constants, errors

    cause: BaseException = exc
    while type(cause) is RuntimeError and cause.__cause__ is not None:  # the client wraps what a transfer raised
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status == 401 and not isinstance(cause, errors.LocalTokenNotFoundError):
        return "the hub does not accept the token; log in again with `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"the token may not write there; see {constants.ENDPOINT}/settings/tokens, or choose another owner"
    known: dict[type[Exception], str] = {
        errors.LocalTokenNotFoundError: "uploading needs a token; log in with `hf auth login`, or set HF_TOKEN",
        errors.OfflineModeIsEnabled: "cannot be uploaded, since HF_HUB_OFFLINE is set; unset it",
    }
    return hub_failure(cause, known, disk="check the disk and try again", offline="check it and try again")
