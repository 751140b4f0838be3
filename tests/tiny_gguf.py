"""GGUF files of tiny random models, as llama.cpp's converter writes them, for tests of what reads them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from tests.tiny import TEMPLATE

# id 0 to 2 are control tokens, 3 a user-defined one, then every byte, then what the merges make.
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3"]
TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES),
]  # fmt: skip

# mlx-lm's names, by what llama.cpp calls them; the Gemmas' extra norms below.
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
GEMMA_NAMES = {
    **NAMES, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
# Where the metadata holds a setting that only some families' configs have.
SETTINGS = {
    "sliding_window": "attention.sliding_window", "sliding_window_pattern": "attention.sliding_window_pattern",
    "rope_local_base_freq": "rope.freq_base_swa", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "vocab_size": len(TOKENS), "rope_theta": 100000.0,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def make_model(config: dict[str, Any]) -> Any:
    """A random mlx-lm model whose norms and biases are not the trivial ones."""
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text" and config["tie_word_embeddings"]:
        model.sanitize({})
    spread = [(n, p + 0.3 * mx.random.normal(p.shape) * (p.ndim == 1)) for n, p in tree_flatten(model.parameters())]
    model.load_weights(spread)
    return model


def to_gguf(name: str, value: np.ndarray[Any, Any], config: dict[str, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    """An mlx-lm parameter as llama.cpp's converter writes it."""
    *_, module, suffix = name.split(".")
    gemma = config["model_type"].startswith("gemma")
    if gemma and module.endswith("norm"):
        value = value + 1
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if module in top:
        return f"{top[module]}.{suffix}", value
    if config["model_type"] == "llama" and module in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if module == "q_proj" else "num_key_value_heads"]
        rows = value.reshape(heads, 2, -1, *value.shape[1:])
        value = rows.swapaxes(1, 2).reshape(value.shape)
    names = GEMMA_NAMES if gemma and config["model_type"] != "gemma" else NAMES
    return f"blk.{name.split('.')[2]}.{names[module]}.{suffix}", value


def write_gguf(
    path: Path,
    config: dict[str, Any],
    model: Any,
    *,
    kind: Kind = Kind.F32,
    pre: str = "smollm",
    edit: Callable[[dict[str, Any], dict[str, tuple[Any, Kind]]], None] | None = None,
) -> Path:
    """Write a GGUF file of `model`; `edit` may change the metadata and tensors before."""
    architecture = config["model_type"].removesuffix("_text")
    values: dict[str, Any] = {
        "general.license": "apache-2.0",
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{architecture}.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(TOKENS) - 4),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    if "head_dim" in config:
        values[f"{architecture}.attention.key_length"] = config["head_dim"]
        values[f"{architecture}.attention.value_length"] = config["head_dim"]
    values |= {f"{architecture}.{key}": config[name] for name, key in SETTINGS.items() if name in config}
    tensors: dict[str, tuple[Any, Kind]] = {}
    for name, parameter in tree_flatten(model.parameters()):
        gguf_name, value = to_gguf(name, np.array(parameter.astype(mx.float32)), config)
        tensors[gguf_name] = (value, kind if value.ndim > 1 else Kind.F32)
    if edit is not None:
        edit(values, tensors)
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", architecture))
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (value, tensor_kind) in tensors.items():
        # Bytes are taken as they are: the package cannot quantize to every type.
        raw = value if value.dtype == np.uint8 else np.ascontiguousarray(quantize(value, tensor_kind))
        writer.add_tensor(name, raw, raw_dtype=tensor_kind if raw.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def train_sentencepiece(*, prefix: bool, byte_fallback: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A small real SentencePiece BPE model, of the kind that Gemma (without prefix) and Llama 2 (with it) have."""
    random = np.random.default_rng(0)
    words = ["the", "there", "then", "hen", "été", "東京", "текст", "12", "123", "(x)", "==", "aaa", "ab", "abab"]
    lines = [" ".join(random.choice(words, 12)) for _ in range(400)]
    own = ["\n", "\n\n", "\n\n\n", "\t", "▁▁", "▁▁▁", "<b>"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=340, model_type="bpe", minloglevel=2,
        byte_fallback=byte_fallback, add_dummy_prefix=prefix, remove_extra_whitespaces=False, split_digits=True,
        normalization_rule_name="identity", character_coverage=1.0, hard_vocab_limit=False, pad_id=3,
        allow_whitespace_only_pieces=True, control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=[] if prefix else own,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(processor: sentencepiece.SentencePieceProcessor, *, prefix: bool) -> dict[str, Any]:
    """A SentencePiece vocabulary as llama.cpp's converter writes it, but for `add_bos_token`."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto()).pieces
    # The converter writes the spaces of user-defined pieces as spaces.
    tokens = [piece.piece.replace("▁", " ") if piece.type == 4 else piece.piece for piece in pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.padding_token_id": processor.pad_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
