"""Training of sparsity predictors and of the models that they prune. The runtime does not import it.

from ifprune_mlx.train import TrainConfig, train
result = train(TrainConfig(model="base", stage="distill", data={"code": "code.jsonl"}, output="distilled"))
print(result.path)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifprune_mlx.train.config import TrainConfig
    from ifprune_mlx.train.stages import TrainResult, train

_MODULES = {"TrainConfig": "config", "TrainResult": "stages", "train": "stages"}

__all__ = ["TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
