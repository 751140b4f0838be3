"""The tokenizer that lies in a GGUF file's metadata, rebuilt as Hugging Face files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ifprune_mlx.errors import SourceError
from ifprune_mlx.tokenizer import DEFAULT

from .chat_templates import put_templates
from .gguf_header import AGAIN, ORIGINAL, Metadata
from .spm_tokenizer import build_sentencepiece

_CONTROL, _USER_DEFINED = 3, 4
# `tokenizer.ggml.model` of the two kinds.
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
# llama.cpp ends an answer at these tokens whatever the header names, and holds them for control tokens.
_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
})  # fmt: skip
# Of filling in the middle: padding, and where another file begins.
_FILE_ENDS = frozenset({
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
    "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
_SPARE_KEYS = ("padding_token_id", "unknown_token_id")
_END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Where all of the first are in the vocabulary, the second ends a part of an answer and not the whole. The last is ours:
# Gemma has HTML's tag of that name, and llama.cpp ends answers there, in the middle of a page.
_NO_END = (({"<|return|>", "<|call|>"}, "<|end|>"), ({"<|calls|>", "<|flush|>"}, "<|end|>"),
           ({"<|tool_response>"}, "</s>"),
           ({"<end_of_turn>"}, "</s>"))  # fmt: skip
_GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = "llama-bpe"
# Digits stay single in Qwen's tokens and come in threes in Llama's; the rest of the expression is the same.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How text is cut into words before byte pairs are merged, by `tokenizer.ggml.pre`.
_PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "default": _GPT2_SPLIT,
    "gpt-2": _GPT2_SPLIT,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2_SPLIT]),
    "qwen2": _split_words(""),
    _LLAMA3: _split_words("{1,3}"),
}


def write_tokenizer(metadata: Metadata, config: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises:
        SourceError: if the vocabulary, merges or special tokens in the metadata contradict each other.
    """
    tokenizer, special = _build_tokenizer(metadata, config["vocab_size"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
        "add_eos_token": _adds_eos(metadata),
    }
    settings |= {f"{role}_token": tokenizer.id_to_token(token) for role, token in special.items()}
    _write_json(folder / "tokenizer_config.json", settings)
    if templates := _chat_templates(metadata):
        put_templates(templates, folder)
    generation = {f"{role}_token_id": special[role] for role in ("bos", "pad") if role in special}
    if "eos_token_id" in config:
        generation["eos_token_id"] = config["eos_token_id"]
    _write_json(folder / "generation_config.json", generation)


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    """The file's chat templates by name."""
    key = "tokenizer.chat_template"
    names = {name: name.removeprefix(f"{key}.") for name in metadata.values if name.startswith(f"{key}.")}
    found = {short: metadata.optional(name, str) for name, short in names.items()}
    if (plain := metadata.optional(key, str)) is not None:
        found[DEFAULT] = plain
    return found


def check_tokenizer_kind(metadata: Metadata) -> None:
    """Refuse at opening, and not after all tensors are converted, a tokenizer that cannot be rebuilt."""
    kind = metadata.values.get("tokenizer.ggml.model")
    if kind is None:
        raise SourceError(f"{metadata.path}: has no tokenizer; {ORIGINAL}")
    before = metadata.values.get("tokenizer.ggml.pre")
    if kind == _BYTE_LEVEL:
        lists = {"tokens": str, "merges": str, "token_type": int}
        known = isinstance(before, str) and before in _PRE_TOKENIZERS
    else:
        lists = {"tokens": str, "scores": float, "token_type": int}
        known = kind == _SENTENCEPIECE
    if not known:
        name = f"{kind!r} with pre-tokenizer {before!r}" if kind == _BYTE_LEVEL else repr(kind)
        raise SourceError(f"{metadata.path}: this GGUF's tokenizer kind ({name}) is not supported yet; {ORIGINAL}")
    for key, item in lists.items():
        value = metadata.required(f"tokenizer.ggml.{key}", list)
        if not all(isinstance(entry, item) for entry in value):
            raise SourceError(
                f"{metadata.path}: metadata tokenizer.ggml.{key} is not a list of {item.__name__}; {AGAIN}"
            )
    if kind == _SENTENCEPIECE:
        for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
            if metadata.values.get(f"tokenizer.ggml.{key}"):
                raise SourceError(
                    f"{metadata.path}: its tokenizer changes text first (tokenizer.ggml.{key}), "
                    f"which is not supported; {ORIGINAL}"
                )


def special_ids(metadata: Metadata, vocab_size: int) -> dict[str, int]:
    """The ids of the bos, eos, unk and pad tokens, those of them that the file names; eos is found by its text, too."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {role: _token_id(metadata, f"{key}_token_id", vocab_size) for role, key in keys.items()}
    if found["eos"] is None:
        found["eos"] = next(iter(end_ids(metadata, {}, vocab_size)), None)
    return {role: token for role, token in found.items() if token is not None}


def end_ids(metadata: Metadata, special: dict[str, int], vocab_size: int) -> list[int]:
    """The ids that end an answer, as llama.cpp finds them: those that the file names, and others by their text."""
    named = [special.get("eos"), *(_token_id(metadata, f"{key}_token_id", vocab_size) for key in _END_KEYS)]
    texts = _end_texts(metadata.values["tokenizer.ggml.tokens"])
    tokens = enumerate(metadata.values["tokenizer.ggml.tokens"][:vocab_size])
    found = sorted((token in _FILE_ENDS, number) for number, token in tokens if token in texts)
    return list(dict.fromkeys(token for token in (*named, *(number for _, number in found)) if token is not None))


def _end_texts(tokens: list[str]) -> frozenset[str]:
    """Those tokens of a vocabulary that end an answer by their text."""
    found = (_ENDS | _FILE_ENDS).intersection(tokens)
    return found - {partial for whole, partial in _NO_END if whole <= found}


def _is_sentencepiece(metadata: Metadata) -> bool:
    return bool(metadata.values["tokenizer.ggml.model"] == _SENTENCEPIECE)


def _token_id(metadata: Metadata, key: str, vocab_size: int) -> int | None:
    token = metadata.optional(f"tokenizer.ggml.{key}", int)
    tokens = len(metadata.values["tokenizer.ggml.tokens"])
    if token is not None and not 0 <= token < min(tokens, vocab_size):
        if key in _SPARE_KEYS:  # often a padding token that was never added; llama.cpp does without, too
            return None
        raise SourceError(
            f"{metadata.path}: metadata tokenizer.ggml.{key} is {token}, but there is no such token; {AGAIN}"
        )
    return None if token is None else int(token)


def _adds_bos(metadata: Metadata) -> bool:
    """Whether text starts with the bos token; llama.cpp's default where the file does not say."""
    adds = metadata.optional("tokenizer.ggml.add_bos_token", bool)
    if adds is None:
        return _is_sentencepiece(metadata) or metadata.values["tokenizer.ggml.pre"] == _LLAMA3
    return bool(adds)


def _adds_eos(metadata: Metadata) -> bool:
    return bool(metadata.optional("tokenizer.ggml.add_eos_token", bool))


def _build_tokenizer(metadata: Metadata, vocab_size: int) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer that the metadata describes, and the ids of its special tokens."""
    path, values = metadata.path, metadata.values
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    types: list[int] = values["tokenizer.ggml.token_type"]
    different = len(set(tokens))
    if not different == len(tokens) == len(types) <= vocab_size:
        raise SourceError(
            f"{path}: the vocabulary has {len(tokens)} tokens, {different} of them different, {len(types)} types "
            f"and {vocab_size} embeddings; {AGAIN}"
        )
    ends, special = _end_texts(tokens), special_ids(metadata, vocab_size)
    # Also where the file has them for plain text: a template's end of turn must become this token.
    types = [_CONTROL if token in ends else kind for token, kind in zip(tokens, types, strict=True)]
    if _is_sentencepiece(metadata):
        prefix = metadata.optional("tokenizer.ggml.add_space_prefix", bool)
        unknown = tokens[special["unk"]] if "unk" in special else None
        scores: list[float] = values["tokenizer.ggml.scores"]
        tokenizer = build_sentencepiece(path, tokens, scores, types, prefix is not False, unknown)
        plain = None
    else:
        tokenizer = _build_byte_level(metadata, tokens, types)
        plain = processors.ByteLevel(trim_offsets=False)
    if (processor := _post_processor(metadata, tokens, special, plain)) is not None:
        tokenizer.post_processor = processor
    return tokenizer, special


def _build_byte_level(metadata: Metadata, tokens: list[str], types: list[int]) -> Tokenizer:
    path, values = metadata.path, metadata.values
    before = values["tokenizer.ggml.pre"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # A token may begin with the separator, but is never empty.
    merges = [
        (merge[:cut], merge[cut + 1 :]) for merge in values["tokenizer.ggml.merges"] if (cut := merge.find(" ", 1)) > 0
    ]
    try:
        if len(merges) != len(values["tokenizer.ggml.merges"]):
            raise ValueError("a merge that is not two tokens")
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=before == _LLAMA3))
    except Exception as exc:  # tokenizers raises bare Exceptions
        raise SourceError(f"{path}: the vocabulary and merges do not fit together ({exc}); {AGAIN}") from exc
    if before == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[before]
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _post_processor(
    metadata: Metadata, tokens: list[str], special: dict[str, int], plain: processors.PostProcessor | None
) -> processors.PostProcessor | None:
    """Puts bos before and eos after a text, where the file says so, once `plain` is done."""
    bos = tokens[special["bos"]] if _adds_bos(metadata) and "bos" in special else None
    eos = tokens[special["eos"]] if _adds_eos(metadata) and "eos" in special else None
    if bos is None and eos is None:
        return plain
    single = [token for token in (bos, "$A", eos) if token is not None]
    pair = single + [token if token != "$A" else "$B" for token in single]
    used = {token: special[role] for role, token in (("bos", bos), ("eos", eos)) if token is not None}
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(used.items()))
    return template if plain is None else processors.Sequence([plain, template])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
