"""Tiny models of the model types of mlx-lm, their configs made from what each one's `ModelArgs` asks for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from tests.tiny import write_tokenizer

# The last for Python 3.10; it lacks some families.
OLD_MLX_LM = version("mlx-lm").startswith("0.31.")
NEWER = ("mellum", "nanbeige", "olmo_hybrid", "plamo3", "talkie")
# What a required field is given, by its name; a default stands, unless it is named in SHAPES.
VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "conv_bias": False,
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "qk_norm": True,
    "post_norm": False,
    "use_expert_bias": True,
    "layer_norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "routed_scaling_factor": 1.5,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    "dim_model_base": 32,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_intermediate_size": 96,
    "shared_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    "layer_group_size": 2,
    "group_norm_size": 1,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "n_groups": 1,
    "state_size": 16,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rotary_dim": 16,
}
# Of every config that knows the field, whether it must or not.
SHAPES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# Fields that no other family has under the same meaning; a text_config is filled in by itself.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 1, "num_heads": 4, "num_kv_heads": 2},
    "afmoe": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
    },
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "bailing_moe_v3": {"moe_intermediate_size": 96},
    "dbrx": {
        "d_model": 64,
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "n_layers": 2,
        "n_heads": 4,
    },
    "deepseek_v2": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 256},
        "moe_intermediate_size": 96,
        "n_shared_experts": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "topk_method": "greedy",
    },
    "gemma3_text": {"sliding_window_pattern": 2, "sliding_window": 32},
    "exaone": {"num_layers": 4},
    "exaone4": {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 4},
    "exaone_moe": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "is_moe_layer": [False, True, True, True],
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    "gear": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 320,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "rope_scaling": {},
    },
    "gemma4": {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": False, "cla_share_factor": 2},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "full_attn_layers": [4],
        },
        "model_max_length": 512,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    "lfm2": {
        "block_dim": 64,
        "block_ff_dim": 192,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": [1, 3],
    },
    "lfm2_moe": {"num_dense_layers": 2, "full_attn_idxs": [1, 3]},
    "lille-130m": {"block_size": 128, "n_embd": 64, "n_head": 4, "n_kv_heads": 2, "n_layer": 4},
    "llama4": {
        "intermediate_size_mlp": 160,
        "no_rope_layers": [1, 1, 1, 0],
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "attn_temperature_tuning": 4,
        "attention_chunk_size": 64,
        "interleave_moe_layer_step": 2,
    },
    "llama4_text": {"intermediate_size_mlp": 160, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 96,
        "zero_expert_num": 2,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba": {"time_step_rank": 8},
    "mellum": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {name: {"rope_theta": 1e4} for name in ("sliding_attention", "full_attention")},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "n_shared_experts": None,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 1,
    },
    "minicpm": {"tie_word_embeddings": False},
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 256,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
        },
    },
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        }
    },
    "nemotron-nas": {
        "intermediate_size": None,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": factor}} for factor in (1.0, 2.0, 3.0, 1.5)
        ],
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
    },
    "openelm": {
        "num_transformer_layers": 3,
        "model_dim": 64,
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4, 4],
        "num_kv_heads": [2, 2, 2],
        "ffn_multipliers": [1.0, 2.0, 3.0],
    },
    "phi3small": {"dense_attention_every_n_layers": 2, "ff_intermediate_size": 128, "gegelu_limit": 20.0},
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        }
    },
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 96},
    "qwen3_5": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
    },
    "qwen3_next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 96,
        "full_attention_interval": 2,
    },
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 32,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 96,
        "share_expert_dim": 96,
        "moe_layers_enum": "2,3",
    },
}
# Multimodal wrappers, whose language model is a family of its own.
WRAPPERS = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mistral3": "mistral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3",
}
_INNER = ("TextConfig", "TextArgs", "TextModelArgs")


def cases(model_types: Iterable[str]) -> list[Any]:
    """Model types as a test's parameters, skipped where mlx-lm lacks them."""
    lacks = pytest.mark.skipif(OLD_MLX_LM, reason="mlx-lm 0.31 lacks the family")
    return [pytest.param(name, marks=lacks) if name in NEWER else name for name in model_types]


def family_model(model_type: str) -> Any:
    """A dense model with random weights, float32."""
    config = tiny_config(model_type)
    assert config is not None
    mx.random.seed(1)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(json.loads(json.dumps(config))))
    # Some arrays begin as zeros or ones, under which a model forgets what is to be compared.
    arrays = {
        name: array + 0.05 * mx.random.normal(array.shape)
        for name, array in tree_flatten(model.parameters())
        if array.dtype == mx.float32
    }
    model.load_weights(list(arrays.items()), strict=False)
    mx.eval(model.parameters())
    model.eval()
    return model


def write_family(folder: Path, model_type: str) -> Any:
    """The same as a dense folder; returns the model."""
    model = family_model(model_type)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(model_type)))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    write_tokenizer(folder)
    return model


def tiny_config(model_type: str) -> dict[str, Any] | None:
    """A config that gives a model of a few hundred thousand weights; None if a field's value is not known here."""
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    arguments = getattr(module, "ModelArgs", None)
    if arguments is None or not hasattr(module, "Model"):
        return None
    config: dict[str, Any] = {"model_type": model_type}
    overrides = OVERRIDES.get(model_type, {})
    if model_type in WRAPPERS:
        inner = next((getattr(module, name) for name in _INNER if hasattr(module, name)), None)
        text = _filled(inner, overrides) if inner is not None else _inner(WRAPPERS[model_type], overrides)
        if any(field.name == "vocab_size" for field in fields(arguments)):  # gemma4's goes before the inner one
            config["vocab_size"] = SHAPES["vocab_size"]
        return None if text is None else config | {"text_config": text | {"model_type": WRAPPERS[model_type]}}
    filled = _filled(arguments, overrides)
    return None if filled is None else config | filled


def _inner(model_type: str, overrides: dict[str, Any]) -> dict[str, Any] | None:
    return _filled(importlib.import_module(f"mlx_lm.models.{model_type}").ModelArgs, overrides)


def _filled(arguments: Any, overrides: dict[str, Any]) -> dict[str, Any] | None:
    config = dict(overrides)  # some fields are for transformers, which reads configs with the tokenizer
    for field in fields(arguments):
        required = field.default is MISSING and field.default_factory is MISSING
        if field.name in overrides:
            continue
        if field.name in SHAPES:
            config[field.name] = SHAPES[field.name]
        elif required and field.name in VALUES:
            config[field.name] = VALUES[field.name]
        elif required and field.name != "model_type":
            return None
    return config
