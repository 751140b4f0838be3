"""Runs in an interpreter that has torch and transformers: a predictor in the paper's layout, and what it scores.

    python torch_predictor.py OUT whole|inner|untied < texts.json

OUT must hold tokenizer files. Adds config.json and predictor.safetensors, and scores.npz: for text i tokens_i, scores_i
float32 [layers, d_ffn], and top_i [layers, k], the sorted ids of the best.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

LAYERS, D_FFN, KEEP = 2, 128, 40


class Predictor(nn.Module):
    """A backbone, and two linear layers on its last state."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.feature_extractor = backbone
        self.prediction_head1 = nn.Linear(width, 128)
        self.prediction_head2 = nn.Linear(128, LAYERS * D_FFN)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores [layers, d_ffn] for tokens [1, length]."""
        states = self.feature_extractor(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        scores: torch.Tensor = self.prediction_head2(self.prediction_head1(states[0, -1])).view(LAYERS, D_FFN)
        return scores


def main() -> None:
    out, kind = Path(sys.argv[1]), sys.argv[2]
    texts: list[str] = json.load(sys.stdin)
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=kind != "untied",
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    predictor = Predictor(model if kind != "inner" else model.model, config.hidden_size).eval()
    # A tied output layer is the embeddings once more, and a safetensors file cannot share.
    state = {name: tensor.contiguous().clone() for name, tensor in predictor.state_dict().items()}
    save_file(state, out / "predictor.safetensors")
    config.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    arrays: dict[str, Any] = {}
    for index, text in enumerate(texts):
        messages = [{"role": "user", "content": text}]
        written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(written, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            scores = predictor(tokens)
        arrays[f"tokens_{index}"] = tokens[0].numpy()
        arrays[f"scores_{index}"] = scores.numpy()
        arrays[f"top_{index}"] = scores.topk(KEEP, dim=1).indices.sort(dim=1).values.numpy()
    np.savez(out / "scores.npz", **arrays)


if __name__ == "__main__":
    main()
