"""Quality: losses under selections beside their controls, tasks, verdicts, charts.

    from ifprune_mlx.eval import EvalConfig, evaluate
    result = evaluate(EvalConfig("path/to/ifp-checkpoint", data={"code": "code.jsonl"}, densities=(0.27, 0.5)))

Names are imported when they are first used, as those of `ifprune_mlx`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifprune_mlx.eval.evaluator import EvalConfig, EvalResult, evaluate

__all__ = ["EvalConfig", "EvalResult", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ifprune_mlx.eval.evaluator"), name)
