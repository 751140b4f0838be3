"""Prompts whose answers need their own neurons, by construction: the model wrote each on a selection of its own.

Whoever selects for a prompt what its answer was written on sees the lowest loss; no other selection knows the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Instruction, Model, Selected, Selection
from ifprune_mlx.train.encoding import Encoded
from tests.tiny import write_source


@dataclass(frozen=True)
class Table:
    """A selector that looks its selections up by the instruction's text."""

    selections: Mapping[str, Selection]
    name: str = "table"

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """The selection in the table."""
        return Selected(self.selections[instruction.text])


def random_selection(model: Model, keep: Sequence[int], generator: np.random.Generator) -> Selection:
    """Arbitrary neurons."""
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    ids = [np.sort(generator.permutation(width)[:k]).astype(np.int32) for width, k in zip(widths, keep, strict=True)]
    return Selection(tuple(ids), tuple(widths), "planted")


def plant(model: Model, selections: Mapping[str, Selection], domain: str, seed: int, answer: int = 24) -> list[Encoded]:
    """One example per selection: a random prompt named by its key, and what the model says to it on that selection."""
    generator = np.random.default_rng(seed)
    examples = []
    for text, selection in selections.items():
        prompt = generator.integers(3, 250, size=int(generator.integers(5, 12))).tolist()
        model.switch(selection)
        said = [int(token) for token, _ in generate_step(mx.array(prompt), model.module, max_tokens=answer)]
        tokens = np.array([*prompt, *said], np.int32)
        examples.append(Encoded(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt), text, domain, text))
    return examples


def write_sharp_checkpoint(folder: Path) -> Path:
    """A tiny checkpoint whose FFNs say what comes next: random, but with strong down projections and sharp logits."""
    source = write_source(folder.with_name(f"source-of-{folder.name}"), "llama-untied")
    arrays = mx.load(str(source / "model.safetensors"))
    assert isinstance(arrays, dict)
    scales = {"down_proj": 8, "lm_head": 4}
    changed = {
        name: array * next((scale for part, scale in scales.items() if part in name), 1)
        for name, array in arrays.items()
    }
    mx.eval(changed)
    mx.save_safetensors(str(source / "model.safetensors"), changed, {"format": "mlx"})
    convert(open_source(source), folder, Options())
    return folder
