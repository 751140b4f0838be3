"""Tiny random models of real families, as dense folders and as IFP checkpoints, for tests that need no real weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 320
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"model_type": "llama"},
    "llama-bias": _COMMON | {"model_type": "llama", "mlp_bias": True, "attention_bias": True},
    "llama-untied": _COMMON | {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": _COMMON | {"model_type": "mistral", "head_dim": 16},
    "qwen2": _COMMON | {"model_type": "qwen2"},
    "qwen3": _COMMON | {"model_type": "qwen3", "head_dim": 16},
    "gemma2": _COMMON
    | {
        "model_type": "gemma2",
        "head_dim": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    },
}


def make_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A dense mlx-lm model with random weights, float32."""
    mx.random.seed(seed)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    return model


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer (every byte is a token) with ChatML's special tokens and template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def add_tokens(folder: Path, texts: Sequence[str], *, special: bool = False) -> None:
    """Give a folder's tokenizer further tokens, whose ids follow the last one."""
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": special}
    first = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"] += [{"id": first + at, "content": text, **flags} for at, text in enumerate(texts)]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def write_source(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A dense Hugging Face style folder: config, safetensors, tokenizer."""
    config = CONFIGS[family] | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(make_model(config, seed).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    write_tokenizer(folder)
    return folder


def write_checkpoint(folder: Path, family: str = "llama", options: Options | None = None, **changes: Any) -> Path:
    """An IFP checkpoint of a tiny model; its dense source stays beside it in `source-of-<name>`."""
    source = write_source(folder.with_name(f"source-of-{folder.name}"), family, **changes)
    convert(open_source(source), folder, options or Options())
    return folder
