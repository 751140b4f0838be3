"""Turns tokens into output: final text, stop strings, log-probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.detokenizer import Detokenizer, TokenTexts
from ifprune_mlx.serving.engine.request import Request, TokenLogprob
from ifprune_mlx.thinking import ThoughtFinder


class OutputProcessor:
    """Processes the tokens of one answer.

    Attributes:
        finish_reason: `stop` or `length` once the answer has ended.
        matched_stop: the stop string that ended the answer, if any.
        completion_tokens: tokens so far, an end-of-text token included.
    """

    def __init__(self, request: Request, tokenizer: TokenizerWrapper) -> None:
        self.finish_reason: str | None = None
        self.matched_stop: str | None = None
        self.completion_tokens = 0
        self._alternatives = request.logprobs
        self._continues = request.continues
        self._detokenizer = Detokenizer(tokenizer, request.tokens if request.continues else ())
        self._texts = None if request.logprobs is None else TokenTexts(tokenizer)
        self._stops = StopStrings(request.stop)
        self._thoughts = ThoughtFinder(request.thinking) if request.thinking and request.stop else None
        # Tokens whose text is not final yet, each with the length of all text up to its end.
        self._held: deque[tuple[TokenLogprob, int]] = deque()
        self._seen = self._given = 0  # characters: detokenized, and final

    def add(self, token: int, logprobs: mx.array, finish_reason: str | None) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Add the next token.

        Args:
            token: the token's id; not part of the text if `finish_reason` is `stop`.
            logprobs: `[vocabulary]`, evaluated.
            finish_reason: set for the last token.

        Returns:
            The text that is final now, and its tokens if the request has `logprobs`.
        """
        self.completion_tokens += 1
        final = ""
        if finish_reason != "stop":
            # A part of a character stands where the character will.
            offset = self._seen + len(self._detokenizer.held.rstrip("\ufffd"))
            self._detokenizer.add_token(token)
            final = self._new_text()
            if self._texts is not None:
                self._held.append((self._logprob(self._texts, token, logprobs, offset), self._seen))
        if finish_reason is not None:
            self._detokenizer.finalize()
            final += self._new_text() + self._rest()
        self.matched_stop = self._stops.matched
        self.finish_reason = "stop" if self.matched_stop is not None else finish_reason
        self._given += len(final)
        ready = []
        while self._held and (self._held[0][1] <= self._given or (finish_reason and self.matched_stop is None)):
            ready.append(self._held.popleft()[0])
        return final, tuple(ready)

    def _new_text(self) -> str:
        segment: str = self._detokenizer.last_segment
        self._seen += len(segment)
        if self._thoughts is None:
            return self._stops.feed(segment)
        return "".join(self._outside(*piece) for piece in self._thoughts.feed(segment))

    def _outside(self, thought: bool, text: str) -> str:
        """What is final of a text; no stop string ends thoughts."""
        if not thought:
            return self._stops.feed(text)
        return text if self._stops.matched is None else ""

    def _rest(self) -> str:
        """What was held back, after the last token."""
        rest = "" if self._thoughts is None else self._outside(*self._thoughts.finish())
        return rest + self._stops.flush()

    def _logprob(self, texts: TokenTexts, token: int, logprobs: mx.array, offset: int) -> TokenLogprob:
        alternatives = self._alternatives or 0
        values = np.array(logprobs.astype(mx.float32))
        best = np.argpartition(-values, alternatives)[:alternatives]
        best = best[np.argsort(-values[best], kind="stable")]
        first = self.completion_tokens == 1 and not self._continues
        top = tuple((int(one), texts.text(int(one), first=first), float(values[one])) for one in best)
        return TokenLogprob(token, texts.text(token, first=first), float(values[token]), top, offset)


class StopStrings:
    """Passes text on as soon as no stop string can begin in it. The stop string that is complete first ends the text.

    Attributes:
        matched: the stop string that ended the text, if any; nothing comes after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = stops
        self._pending = ""

    def feed(self, text: str) -> str:
        """Add a piece of text; returns what is final now."""
        if self.matched is not None:
            return ""
        text = self._pending + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, self.matched = min(found, key=lambda at: (at[0] + len(at[1]), at[0]))
            self._pending = ""
            return text[:start]
        # Hold back the longest end of the text that may begin a stop string.
        size = len(text)
        lengths = (n for stop in self._stops for n in range(1, min(len(stop), size + 1)) if text.endswith(stop[:n]))
        final = size - max(lengths, default=0)
        self._pending = text[final:]
        return text[:final]

    def flush(self) -> str:
        """Call it after the last piece; returns what was held back."""
        final, self._pending = self._pending, ""
        return final
