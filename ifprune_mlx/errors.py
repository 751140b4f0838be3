"""The one family of errors that a user's input can cause.

Every message is one line that says what is wrong, where, and what to do. The command line prints it as it
is and exits with 1; a Python caller catches `IfpruneError`.
"""

from __future__ import annotations

import shlex
from pathlib import Path


class IfpruneError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do next."""


class CheckpointError(IfpruneError):
    """An IFP checkpoint is damaged, incomplete, or of a format that this version does not read."""


class DenseModelError(CheckpointError):
    """A model that is no IFP checkpoint, and may be converted into one."""


class SourceError(IfpruneError):
    """A dense checkpoint cannot be converted."""


class SelectionError(IfpruneError):
    """A selection is malformed, or belongs to a model of another shape."""


class TaskError(IfpruneError):
    """A named task that does not exist, is damaged, or cannot be kept."""


class PredictorError(IfpruneError):
    """A sparsity predictor is malformed, belongs to another model, or gave scores that are not numbers."""


class BudgetError(IfpruneError):
    """A density, parameter or memory budget that no selection of this model can meet."""


class PromptError(IfpruneError):
    """A prompt that cannot be answered: empty, or longer than the model's context."""


class ContextLengthError(PromptError):
    """A prompt that is longer than the model's context."""


class GrammarError(IfpruneError):
    """A JSON schema that answers cannot be held to: wrong, not supported, or too large."""


class ChatFileError(IfpruneError):
    """A saved chat that cannot be read back."""


class ModelClosedError(IfpruneError):
    """A model was closed, and something that needs it was called."""


class DataError(IfpruneError):
    """A training or evaluation file that cannot be used."""


def not_converted(model: str | Path, what: str) -> DenseModelError:
    """The error for a model that has to be converted first; `what` says what it is."""
    given = shlex.quote(str(model))
    return DenseModelError(
        f"{model}: {what}; `ifprune chat --model {given}` converts it at first use, `ifprune convert --model {given}` "
        "into a folder of its own"
    )


def reason_of(exc: BaseException) -> str:
    """What an error says, short and on one line."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return " ".join(str(exc).split())[:200] or type(exc).__name__
