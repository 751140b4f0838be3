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
    from ifprune_mlx.checkpoint.format import Checkpoint
    from ifprune_mlx.errors import (
        BudgetError,
        ChatFileError,
        CheckpointError,
        DataError,
        GrammarError,
        IfpruneError,
        PredictorError,
        PromptError,
        SelectionError,
        SourceError,
        TaskError,
    )
    from ifprune_mlx.generation import GenerationResponse, Stats, generate, stream_generate
    from ifprune_mlx.model import Model, Switch, load
    from ifprune_mlx.model_lock import ModelBusyError
    from ifprune_mlx.prompt_cache import History
    from ifprune_mlx.selection.predictor import SparsityPredictor
    from ifprune_mlx.selection.presets import Task, TaskStore
    from ifprune_mlx.selection.selection import Selection
    from ifprune_mlx.selection.selectors import Instruction, Selected, Selector, make_selector
    from ifprune_mlx.session import Session

__version__ = "0.1.0"

_MODULES = {
    "checkpoint.format": ("Checkpoint",),
    "errors": (
        "BudgetError",
        "ChatFileError",
        "CheckpointError",
        "DataError",
        "GrammarError",
        "IfpruneError",
        "PredictorError",
        "PromptError",
        "SelectionError",
        "SourceError",
        "TaskError",
    ),
    "generation": ("GenerationResponse", "Stats", "generate", "stream_generate"),
    "prompt_cache": ("History",),
    "model": ("Model", "Switch", "load"),
    "model_lock": ("ModelBusyError",),
    "selection.predictor": ("SparsityPredictor",),
    "selection.selection": ("Selection",),
    "selection.selectors": ("Instruction", "Selected", "Selector", "make_selector"),
    "session": ("Session",),
    "selection.presets": ("Task", "TaskStore"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BudgetError",
    "ChatFileError",
    "Checkpoint",
    "CheckpointError",
    "DataError",
    "GenerationResponse",
    "GrammarError",
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
