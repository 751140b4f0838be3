"""SentencePiece's BPE, as the vocabulary and scores in a GGUF file describe it, as a `tokenizers` tokenizer.

It gives the ids that the `sentencepiece` library gives, and finds control tokens in a text besides, as chat templates
need it.
"""

from __future__ import annotations

import math
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ifprune_mlx.errors import SourceError

from .gguf_header import AGAIN

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_LONGEST_PIECE = 256
_SPACE = "\u2581"


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
