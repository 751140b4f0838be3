"""Tokens as text: what `tokenizer.decode` gives for all of them together, while they come one by one.

mlx-lm's own detokenizers drop the first space of a text, and read some bytes as other characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

# A piece of a vocabulary that stands for one byte where no other piece spells a character.
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_PART = "bytes:"
_PARTS = re.compile(r"bytes:(\\x[0-9a-f]{2})+")
# GPT-2's alphabet of bytes: printable ones stand for themselves, the others come behind them in order.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
# Text whose last space may go away with the next token, where a tokenizer cleans up spaces.
_UNSETTLED = re.compile(r" (|'|n|n'|'v|'r)$")
# The most tokens whose text is held back until a character is complete, and that are read before an answer.
_LONGEST, _CONTEXT = 64, 8


class Detokenizer(StreamingDetokenizer):
    """A streaming detokenizer for every kind of tokenizer, with mlx-lm's interface.

    Args:
        context: tokens that the text continues, such as a raw prompt's. Without them a SentencePiece text begins
            without the space of its first word.

    Attributes:
        tokens: all tokens so far.
        text: their text, but for that of the last ones while it may still change.
        held: that text, as it would be now.
    """

    def __init__(self, tokenizer: TokenizerWrapper, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(context[-_CONTEXT:])
        if self._context and str(tokenizer.decode(self._context)).endswith("\ufffd"):
            self._context = []  # it ends within a character
        self._cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens but the context."""
        self.tokens: list[int] = []
        self.text = self.held = ""
        self.offset = 0
        # The tokens that are decoded together: those whose text came last, which say how the next begin, and the rest.
        self._window = list(self._context)
        self._settle()

    def add_token(self, token: int) -> None:
        """Add the next token."""
        self.tokens.append(token)
        self._window.append(token)
        self._update(_BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None)

    def finalize(self) -> None:
        """Settle the text of the last tokens."""
        self.text += self.held
        self.held = ""
        self._settle()

    def _update(self, is_byte: bool) -> None:
        whole = str(self._tokenizer.decode(self._window))
        self.held = whole[len(self._before) :]
        # A run of byte pieces is decoded as one: a bad byte at its end changes all of it.
        changes = is_byte or whole.endswith("\ufffd") or (self._cleans and _UNSETTLED.search(whole))
        if changes and len(self._window) - self._settled <= _LONGEST:
            return
        if self.held:
            self.text += self.held
            self.held = ""
            self._window = self._window[self._settled :]
            self._settle()
        elif len(self._window) - self._settled > _LONGEST:
            del self._window[self._settled :]  # tokens without text

    def _settle(self) -> None:
        self._settled = len(self._window)
        self._before = str(self._tokenizer.decode(self._window)) if self._window else ""


class _Continuing(TokenizerWrapper):
    """A tokenizer whose detokenizers begin behind a context; mlx-lm asks it for them."""

    def __init__(self, tokenizer: TokenizerWrapper, context: Sequence[int]) -> None:
        self.__dict__.update(vars(tokenizer))  # mlx-lm's class would look at the whole vocabulary again
        self._context = context

    @property
    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self, self._context)


def continuing(tokenizer: Any, context: Sequence[int] = ()) -> TokenizerWrapper:
    """The same tokenizer for mlx-lm's functions, with exact detokenizers; see `Detokenizer` for `context`."""
    wrapped = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    return _Continuing(wrapped, context)


class TokenTexts:
    r"""The texts of single tokens, as they are within a text; `bytes:\xe6` for a part of a character, as OpenAI's."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        # Behind another token: at the beginning of a text, SentencePiece pieces lose their space.
        self._anchor = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._skipped = len(tokenizer.decode(self._anchor))

    def text(self, token: int, *, first: bool = False) -> str:
        """A token's text.

        Args:
            first: the token begins a text.
        """
        before, skipped = ([], 0) if first else (self._anchor, self._skipped)
        text = str(self._tokenizer.decode([*before, token]))[skipped:]
        if "\ufffd" not in text:
            return text
        raw = self._raw(token, text)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return _PART + "".join(f"\\x{byte:02x}" for byte in raw)

    def _raw(self, token: int, text: str) -> bytes:
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if (match := _BYTE.fullmatch(piece)) is not None:
            return bytes.fromhex(match[1])
        known = [_BYTE_LEVEL.get(character) for character in piece]
        return text.encode() if None in known else bytes(byte for byte in known if byte is not None)


def bytes_of(text: str) -> bytes:
    """The bytes of a text of `TokenTexts`."""
    if _PARTS.fullmatch(text) is not None:
        return bytes.fromhex(text.removeprefix(_PART).replace("\\x", ""))
    return text.encode()
