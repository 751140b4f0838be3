"""The tokenizer of a folder that has a SentencePiece model only (tokenizer.model), rebuilt as Hugging Face files.

transformers would build one by the class that the folder names, and its classes give other ids than the `sentencepiece`
library: Llama's makes BPE of every model, and drops the space before a text that begins with one. Here the model file
decides: its kind, normalization and pieces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from ifprune_convert.wording import first_line
from ifprune_mlx.errors import SourceError

from .gguf_sentencepiece import build_sentencepiece

_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"
_ADVICE = "download the model's tokenizer.json beside it"
_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
# Of the folder's settings: these belong to the classes that are not used, or say what tokenizer.json says.
_DROPPED = ("added_tokens_decoder", "auto_map", "legacy", "sp_model_kwargs", "tokenizer_file", "vocab_file")
REPLACED = ("special_tokens_map.json", "added_tokens.json")
"""Tokenizer files whose contents `write_spm_tokenizer` puts elsewhere; beside what it writes they would be wrong."""


def write_spm_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for the tokenizer.model in `source`.

    Special tokens are found in a text, as chat templates need it; other text gets the ids that `sentencepiece` gives.
    Behind a special token a text begins anew, with the model's space before it; where the settings say `legacy: false`
    it does not, and neither does a text that begins with a space.

    Raises:
        SourceError: if one of the files is damaged, of a kind that is not supported, or contradicts another.
    """
    file = source / "tokenizer.model"
    # Untyped: protobuf makes its classes when it is imported.
    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009
    try:
        proto.ParseFromString(file.read_bytes())
    except OSError as exc:
        raise SourceError(f"{file}: cannot be read ({exc.strerror or exc})") from None
    except Exception:  # protobuf's DecodeError
        proto.Clear()
    if not proto.pieces:
        raise SourceError(f"{file}: is not a SentencePiece model; {_ADVICE}")
    settings = _read_json(source / "tokenizer_config.json")
    for key, value in _read_json(source / "special_tokens_map.json").items():
        settings.setdefault(key, value)
    try:
        tokenizer = _build(file, proto, settings)
        _add_tokens(file, tokenizer, source, settings)
        special = _special_tokens(proto, settings)
        adds = {"bos": bool(settings.get("add_bos_token", True)), "eos": bool(settings.get("add_eos_token", False))}
        _add_ends(tokenizer, {role: special[role] for role, added in adds.items() if added and role in special})
    except SourceError:
        raise
    except Exception as exc:  # `tokenizers` raises Exception itself; settings can be of any shape
        raise SourceError(f"{file}: cannot be made a tokenizer ({first_line(exc)}); {_ADVICE}") from None
    for key in _DROPPED:
        settings.pop(key, None)
    settings |= {f"{role}_token": token for role, token in special.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds["bos"] and "bos" in special,
        "add_eos_token": adds["eos"] and "eos" in special,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )


def _build(file: Path, proto: Any, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a SentencePiece model, without what the folder adds."""
    trained, normal = proto.trainer_spec, proto.normalizer_spec
    if trained.model_type not in (_UNIGRAM, _BPE):
        raise SourceError(f"{file}: is a SentencePiece model of words or characters, not supported; {_ADVICE}")
    if trained.treat_whitespace_as_suffix or not normal.escape_whitespaces:
        raise SourceError(f"{file}: treats spaces in a way that is not supported; {_ADVICE}")
    prefix = bool(normal.add_dummy_prefix) and settings.get("add_prefix_space") is not False
    pieces = [piece.piece for piece in proto.pieces]
    scores = [float(piece.score) for piece in proto.pieces]
    types = [int(piece.type) for piece in proto.pieces]
    unknown = trained.unk_piece if trained.unk_piece in pieces else None
    # Also for unigram: what is around the model is the same.
    tokenizer = build_sentencepiece(file, pieces, scores, types, prefix, unknown)
    if trained.model_type == _UNIGRAM:
        bytes_too = bool(trained.byte_fallback)
        tokenizer.model = models.Unigram(list(zip(pieces, scores, strict=True)), int(trained.unk_id), bytes_too)
    steps: list[normalizers.Normalizer] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and settings.get("legacy", True) is False:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
        tokenizer.normalizer = normalizers.Sequence(steps)
    elif steps:
        tokenizer.normalizer = normalizers.Sequence([*steps, tokenizer.normalizer])
    return tokenizer


def _add_tokens(file: Path, tokenizer: Tokenizer, source: Path, settings: dict[str, Any]) -> None:
    """Add the tokens that the folder has beside the model's, each with the id that the folder gives it."""
    wanted: dict[int, tuple[str, bool]] = {}
    for token, number in _read_json(source / "added_tokens.json").items():
        wanted[int(number)] = (str(token), True)
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        wanted[int(number)] = (str(entry["content"]), bool(entry.get("special", True)))
    for number, (token, special) in sorted(wanted.items()):
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise SourceError(
                f"{file}: the folder's added token {token!r} should have the id {number}, and the model gives it "
                f"{tokenizer.token_to_id(token)}; {_ADVICE}"
            )


def _special_tokens(proto: Any, settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens by their roles: as the folder names them, else as the model does."""
    found: dict[str, str] = {}
    for role in _ROLES:
        value = settings.get(f"{role}_token")
        number = getattr(proto.trainer_spec, f"{role}_id", -1)
        if isinstance(value, dict):
            value = value["content"]
        if value is None and f"{role}_token" not in settings and 0 <= number < len(proto.pieces):
            value = proto.pieces[number].piece
        if value is not None:
            found[role] = str(value)
    return found


def _add_ends(tokenizer: Tokenizer, ends: dict[str, str]) -> None:
    """Let the tokenizer put bos before and eos behind a text."""
    numbers = {token: tokenizer.token_to_id(token) for token in ends.values()}
    if not ends or None in numbers.values():
        return
    before, behind = ([ends[role]] if role in ends else [] for role in ("bos", "eos"))
    single = [*before, "$A", *behind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *before, "$B:1", *behind],
        special_tokens=list(numbers.items()),
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SourceError(f"{file}: is not a JSON object; copy or download it again")
    return value
