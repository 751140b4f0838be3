"""Runs in an interpreter that has torch, transformers and peft: adapters that PEFT saved, and what it makes of them.

    python peft_adapters.py OUT

Writes, per case, OUT/NAME/source (a model folder without a tokenizer), OUT/NAME/adapter, and logits of the tokens 0, 7,
14, ... 77 as float32 [12, vocabulary]: OUT/NAME/adapted.npy with the adapter beside the model, OUT/NAME/merged.npy
after `merge_and_unload`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA, LLAMA_BIAS = LlamaConfig(**SIZES), LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True)
QWEN2 = Qwen2Config(**SIZES, tie_word_embeddings=True)
QWEN3 = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (QWEN2, {"target_modules": ALL}),
    "rslora": (QWEN3, {"target_modules": ALL, "use_rslora": True}),
    "dora": (LLAMA, {"target_modules": ALL, "use_dora": True}),
    "patterns": (
        QWEN2,
        {
            "target_modules": ALL,
            "rank_pattern": {"down_proj": 8, r"layers\.0\.self_attn\.q_proj": 2},
            "alpha_pattern": {"model.layers.1.mlp.up_proj": 3, "down_proj": 5},
        },
    ),
    "bias-all": (LLAMA_BIAS, {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "bias-lora-only": (LLAMA_BIAS, {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "lora-bias": (LLAMA_BIAS, {"target_modules": ["v_proj", "gate_proj"], "lora_bias": True}),
    "saved-modules": (LLAMA, {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embeddings": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embeddings-dora": (LLAMA, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "tied": (QWEN2, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied-saved": (
        QWEN2,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


def main() -> None:
    out = Path(sys.argv[1])
    for seed, (name, (config, settings)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(out / name / "source")
        # Where published models have it, and mlx-lm looks for it.
        file = out / name / "source" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": config.rope_parameters["rope_theta"]}))
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings))
        adapted.eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(out / name / "adapter")
        tokens = torch.arange(0, 84, 7)[None]
        with torch.no_grad():
            np.save(out / name / "adapted.npy", adapted(tokens).logits[0].numpy())
            np.save(out / name / "merged.npy", adapted.merge_and_unload()(tokens).logits[0].numpy())


if __name__ == "__main__":
    main()
