"""From tokens to what a job is told: text that is final, stop strings, log-probabilities."""

from __future__ import annotations

from collections import deque
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.serving.engine.request import STOP, Request, TokenLogprob
from ifprune_mlx.serving.engine.stop_strings import StopText


class OutputProcessor:
    """The text of one job, as it grows.

    Attributes:
        finish_reason: `stop` or `length` when it has ended; None before.
        matched_stop: the stop string that ended it, if one did.
        completion_tokens: generated so far, with an end-of-text token.
    """

    def __init__(self, job: Request, tokenizer: TokenizerWrapper) -> None:
        self.finish_reason: str | None = None
        self.matched_stop: str | None = None
        self.completion_tokens = 0
        self._tops = job.logprobs
        self._tokenizer = tokenizer
        self._detokenizer: Any = tokenizer.detokenizer
        self._stops = StopText(job.stop)
        # Tokens that wait for their text, with the length of all text up to their end.
        self._held: deque[tuple[TokenLogprob, int]] = deque()
        self._seen = self._given = 0  # characters: detokenized, and final

    def add(self, token: int, logprobs: mx.array, finish_reason: str | None) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Take in the next token.

        Args:
            token: its id; not part of the text if `finish_reason` is `stop`.
            logprobs: `[vocabulary]`, computed.
            finish_reason: why it is the last one, if it is.

        Returns:
            The text that is final now, and the tokens that gave it, if the job asks for them.
        """
        self.completion_tokens += 1
        final = ""
        if finish_reason != STOP:
            self._detokenizer.add_token(token)
            final = self._text()
            if self._tops is not None:
                self._held.append((self._logprob(token, logprobs, self._tops), self._seen))
        if finish_reason is not None:
            self._detokenizer.finalize()
            final += self._text() + self._stops.flush()
        self.matched_stop = self._stops.matched
        self.finish_reason = STOP if self.matched_stop is not None else finish_reason
        self._given += len(final)
        ready = []
        while self._held and (self._held[0][1] <= self._given or (finish_reason and self.matched_stop is None)):
            ready.append(self._held.popleft()[0])
        return final, tuple(ready)

    def _text(self) -> str:
        segment: str = self._detokenizer.last_segment
        self._seen += len(segment)
        return self._stops.feed(segment)

    def _logprob(self, token: int, logprobs: mx.array, tops: int) -> TokenLogprob:
        values = np.array(logprobs.astype(mx.float32))
        best = np.argpartition(-values, tops)[:tops]
        best = best[np.argsort(-values[best], kind="stable")]
        top = tuple((int(one), self._word(int(one)), float(values[one])) for one in best)
        return TokenLogprob(token, self._word(token), float(values[token]), top)

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
