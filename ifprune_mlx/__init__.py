"""Instruction-Following Pruning (arXiv 2501.02086) for Apple silicon, on MLX and mlx-lm.

from ifprune_mlx import load, stream_generate
model, tokenizer = load("path/to/ifp-checkpoint")
for response in stream_generate(model, tokenizer, [{"role": "user", "content": "Write a haiku."}]):
    print(response.text, end="")
"""

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
)
from .generation import GenerationResponse, Stats, generate, stream_generate
from .history import History
from .model import Model, Switch, load
from .predictor import SparsityPredictor
from .selection import Selection
from .selectors import Instruction, Selected, Selector, make_selector
from .session import Session

__version__ = "0.1.0"

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
    "generate",
    "load",
    "make_selector",
    "stream_generate",
]
