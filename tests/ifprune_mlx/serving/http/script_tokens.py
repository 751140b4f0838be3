"""In a server's process: answers follow a script. See scripted.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx


def install() -> None:
    """In the server's process: every answer follows the script as it is when the answer begins."""
    from ifprune_mlx.serving.engine import decoder

    plain = decoder.make_processors
    decoder.make_processors = lambda *given: [*plain(*given), _Script(Path(os.environ["IFPRUNE_TEST_SCRIPT"]))]


class _Script:
    def __init__(self, script: Path) -> None:
        self._left: list[int] | None = None
        self._script = script

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._left is None:
            self._left = json.loads(self._script.read_text())
            self._script.with_suffix(".prompt").write_text(json.dumps(tokens.tolist()))
        if not self._left:
            return logits
        return logits + 1000.0 * (mx.arange(logits.shape[-1]) == self._left.pop(0))
