"""Adapters with random weights, made and saved as `mlx_lm.lora` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config


def write_adapter(
    folder: Path, source: Path, kind: str = "lora", *, layers: int = -1, noise: float = 0.05, **parameters: Any
) -> Path:
    """An adapter folder for the dense model in `source`, none of its tensors where training would begin.

    Args:
        layers: the number of last layers that are changed, or -1 for all.
        noise: how far tensors are from there, as a standard deviation.
        parameters: changes to mlx-lm's `lora_parameters`.
    """
    model, _ = load_model(source)
    model.freeze()
    lora_parameters: dict[str, Any] | None = {"rank": 4, "dropout": 0.0, "scale": 10.0} | parameters
    if kind == "full":
        for layer in model.layers[-max(layers, 0) :]:
            layer.unfreeze()
        lora_parameters = None
    else:
        linear_to_lora_layers(model, layers, lora_parameters, use_dora=kind == "dora")
    mx.random.seed(5)
    trained = {name: a + noise * mx.random.normal(a.shape) for name, a in tree_flatten(model.trainable_parameters())}
    folder.mkdir(parents=True)
    changes = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": lora_parameters, "model": str(source)}
    save_config(CONFIG_DEFAULTS | changes, folder / "adapter_config.json")
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    return folder
