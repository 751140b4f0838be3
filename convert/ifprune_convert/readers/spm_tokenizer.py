"""SentencePiece vocabularies, of a GGUF file or of a folder's tokenizer.model, as `tokenizers` tokenizers.

They give the ids that the `sentencepiece` library gives, and find control tokens in a text besides, as chat templates
need it. transformers would build one by the class that a folder names, and its classes give other ids: Llama's makes
BPE of every model, and drops the space before a text that begins with one. Here the model file decides: its kind,
normalization and pieces.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.errors import SourceError, reason_of
from ifprune_mlx.tokenizer import panics_as_errors

from .gguf_header import AGAIN

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of pieces
_LONGEST_PIECE = 256
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
        raise SourceError(f"{file}: cannot be read ({reason_of(exc)})") from exc
    except Exception:  # protobuf's DecodeError
        proto.Clear()
    if not proto.pieces:
        raise SourceError(f"{file}: is not a SentencePiece model; {_ADVICE}")
    settings = _read_json(source / "tokenizer_config.json")
    for key, value in _read_json(source / "special_tokens_map.json").items():
        settings.setdefault(key, value)
    try:
        with panics_as_errors():
            tokenizer = _build(file, proto, settings)
            _add_tokens(file, tokenizer, source, settings)
        special = _special_tokens(proto, settings)
        adds = {"bos": bool(settings.get("add_bos_token", True)), "eos": bool(settings.get("add_eos_token", False))}
        _add_ends(tokenizer, {role: special[role] for role, added in adds.items() if added and role in special})
    except SourceError:
        raise
    except Exception as exc:  # `tokenizers` raises Exception itself; settings can be of any shape
        raise SourceError(f"{file}: cannot be made a tokenizer ({reason_of(exc)}); {_ADVICE}") from exc
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
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


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
        # `tokenizers` ends the process where the table is said to be longer than what there is.
        if int.from_bytes(normal.precompiled_charsmap[:4], "little") > len(normal.precompiled_charsmap) - 4:
            raise SourceError(f"{file}: its normalization is damaged; {_ADVICE}")
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
    try:
        return read_json_object(file, SourceError) if file.is_file() else {}
    except SourceError as exc:
        raise SourceError(f"{file}: is not a JSON object; copy or download it again") from exc


def build_sentencepiece(
    path: Path, pieces: list[str], scores: list[float], types: list[int], prefix: bool, unknown: str | None
) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Args:
        path: the file, for error messages.
        pieces: all different; the ids are their places.
        scores: of each piece; of two that can be merged, that with the higher score is.
        types: of each piece, as GGUF numbers them.
        prefix: whether a space is put before every text, and behind every special token.
        unknown: the piece that stands for a character that neither a piece nor byte pieces can spell.

    Raises:
        SourceError: if the lists contradict each other.
    """
    if len(scores) != len(pieces) or not all(map(math.isfinite, scores)):
        raise SourceError(f"{path}: has {len(pieces)} tokens and {len(scores)} scores, or scores not finite; {AGAIN}")
    of_bytes = {piece for piece, kind in zip(pieces, types, strict=True) if kind == _BYTE}
    if of_bytes and of_bytes != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise SourceError(f"{path}: the vocabulary has {len(of_bytes)} byte tokens, but not one for each byte; {AGAIN}")
    if not of_bytes and unknown is None:
        raise SourceError(f"{path}: the vocabulary has neither byte tokens nor one for what is unknown; {AGAIN}")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(
        vocabulary,
        _merges(vocabulary, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=bool(of_bytes),
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    # The forms by which mlx-lm knows that it can detokenize as fast as tokens come.
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    # User-defined pieces are matched after spaces are replaced, the longest first, as SentencePiece does; but with a
    # prefix they would get one as well, and are matched in the text as it is, as llama.cpp does.
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=kind != _USER_DEFINED, normalized=kind == _USER_DEFINED and not prefix)
            for piece, kind in zip(pieces, types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a normal piece of two, the best score first."""
    # Longer ones are no pieces of a language, and would take forever.
    normal = {
        piece: number
        for piece, number in vocabulary.items()
        if types[number] == _NORMAL and len(piece) <= _LONGEST_PIECE
    }
    found = [
        (-scores[number], normal[piece[:cut]], normal[piece[cut:]], piece, cut)
        for piece, number in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    found.sort()
    return [(piece[:cut], piece[cut:]) for *_, piece, cut in found]
