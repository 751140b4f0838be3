"""Adapter folders with random tensors, named and shaped as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

PREFIX = "base_model.model."
# As PEFT 0.21 writes it, settings that are off included.
CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "someone/tiny", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 12, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def write_peft(
    folder: Path,
    modules: dict[str, tuple[int, int, int]],
    more: dict[str, tuple[int, ...]] | None = None,
    **config: Any,
) -> Path:
    """An adapter of float32.

    Args:
        modules: rank, inputs and outputs of every adapted linear layer, by its name in PyTorch.
        more: shapes of further tensors, by their names without PEFT's prefix.
        config: changes to `CONFIG`.
    """
    mx.random.seed(31)
    tensors: dict[str, mx.array] = {}
    for name, (rank, inputs, outputs) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = 0.2 * mx.random.normal((rank, inputs))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = 0.2 * mx.random.normal((outputs, rank))
        if config.get("use_dora"):
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = mx.random.uniform(0.5, 2, (outputs,))
    for name, shape in (more or {}).items():
        tensors[PREFIX + name] = 0.2 * mx.random.normal(shape)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
    return folder
