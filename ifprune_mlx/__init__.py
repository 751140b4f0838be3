"""Instruction-Following Pruning (arXiv 2501.02086) for Apple silicon, on MLX and mlx-lm.

    from ifprune_mlx import load, stream_generate
    model, tokenizer = load("path/to/ifp-checkpoint")
    for response in stream_generate(model, tokenizer, [{"role": "user", "content": "Write a haiku."}]):
        print(response.text, end="")

Names are imported when they are first used: mlx-lm and transformers take over a second, which looking at a checkpoint
or reporting an error need not cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .errors import (
        BudgetError,
        ChatFileError,
        CheckpointError,
        DataError,
        IfpruneError,
        PredictorError,
        PromptError,
        SelectionError,
        SourceError,
        TaskError,
    )
    from .generation import GenerationResponse, Stats, generate, stream_generate
    from .history import History
    from .model import Model, Switch, load
    from .ownership import ModelBusyError
    from .predictor import SparsityPredictor
    from .selection import Selection
    from .selectors import Instruction, Selected, Selector, make_selector
    from .session import Session
    from .task_store import Task, TaskStore

__version__ = "0.1.0"

_MODULES = {
    "checkpoint": ("Checkpoint",),
    "errors": (
        "BudgetError",
        "ChatFileError",
        "CheckpointError",
        "DataError",
        "IfpruneError",
        "PredictorError",
        "PromptError",
        "SelectionError",
        "SourceError",
        "TaskError",
    ),
    "generation": ("GenerationResponse", "Stats", "generate", "stream_generate"),
    "history": ("History",),
    "model": ("Model", "Switch", "load"),
    "ownership": ("ModelBusyError",),
    "predictor": ("SparsityPredictor",),
    "selection": ("Selection",),
    "selectors": ("Instruction", "Selected", "Selector", "make_selector"),
    "session": ("Session",),
    "task_store": ("Task", "TaskStore"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BudgetError",
    "ChatFileError",
    "Checkpoint",
    "CheckpointError",
    "DataError",
    "GenerationResponse",
    "History",
    "IfpruneError",
    "Instruction",
    "Model",
    "ModelBusyError",
    "PredictorError",
    "PromptError",
    "Selected",
    "Selection",
    "SelectionError",
    "Selector",
    "Session",
    "SourceError",
    "SparsityPredictor",
    "Stats",
    "Switch",
    "Task",
    "TaskError",
    "TaskStore",
    "generate",
    "load",
    "make_selector",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
