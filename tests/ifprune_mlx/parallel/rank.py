"""One rank of a test: `python -m tests.ifprune_mlx.parallel.rank RESULTS RESIDENCY=CHECKPOINT...`; rank 0 writes.

The walk is the same in one process, which is a group of one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ifprune_mlx import Model, Selection, load
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.parallel.ranks import join
from ifprune_mlx.selection.selectors import Instruction, make_selector
from tests.ifprune_mlx.reference import greedy, logits, random_selection

PROMPT = [5, 17, 200, 9, 33, 41, 8]
# "<|im_start|>user\nWrite a poem about the sea.<|im_end|>\n<|im_start|>assistant\n" in SmolLM2's tokens.
MESSAGE = [1, 4093, 198, 19161, 253, 8216, 563, 260, 3426, 30, 2, 198, 1, 520, 9531, 198]
SWITCHES = 20
FEWER = "IFPRUNE_TEST_SWITCHES"
SENSIBLE = "IFPRUNE_TEST_SENSIBLE"


def walk(model: Model) -> dict[str, np.ndarray]:
    """Logits and greedy answers after 20 arbitrary switches, and what the activation selector chooses.

    With `SENSIBLE`, selections are near the prior's and the prompt is a message: without its most needed neurons, or on
    arbitrary tokens, a real model answers with logits that the last bit of a sum changes.
    """
    prompt = MESSAGE if os.environ.get(SENSIBLE) else PROMPT
    widths = model.checkpoint.widths
    generator = np.random.default_rng(7)
    found: dict[str, np.ndarray] = {}
    for step in range(int(os.environ.get(FEWER, SWITCHES))):
        keep = [int(generator.integers(width // 4, width // 2)) for width in widths]
        near = os.environ.get(SENSIBLE)
        model.switch(near_prior(model, keep, step) if near else random_selection(widths, keep, step))
        found[f"logits.{step}"] = logits(model, prompt, () if step % 10 else (3,))
        if step % 10 == 0:
            found[f"greedy.{step}"] = np.array(greedy(model.module, prompt, 6))
    if model.residency == "ram":
        selector = make_selector(model, "activation")
        chosen: Selection = selector.select(Instruction("", tuple(prompt)), model.keep(0.5)).selection
        for layer, ids in enumerate(chosen.ids):
            found[f"activation.{layer}"] = ids
        model.switch(None)
        found["logits.dense"] = logits(model, prompt)
    return found


def near_prior(model: Model, keep: list[int], seed: int) -> Selection:
    """The neurons that the prior ranks highest after a disturbance of each."""
    generator = np.random.default_rng(seed)
    ids = []
    for prior, count in zip(model.prior, keep, strict=True):
        disturbed = np.log(prior) + generator.normal(scale=0.5, size=prior.shape)
        ids.append(np.sort(np.argsort(-disturbed)[:count]).astype(np.int32))
    return Selection(tuple(ids), model.checkpoint.widths, "near-prior")


def resident(model: Model) -> int:
    """Bytes of weights in this process."""
    rows = (array for slots in model.slots for array in slots.rows.values())
    return sum(array.nbytes for array in [*rows, *dict(tree_flatten(model.module.parameters())).values()])


def main(results: str, *jobs: str) -> None:
    """See the module."""

    def end(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        os._exit(1)

    ranks = join(end)
    for number, job in enumerate(jobs):
        residency, _, folder = job.partition("=")
        model, _ = load(Checkpoint.open(folder), residency=residency, ranks=ranks)
        found = walk(model)
        found["resident"] = np.array([resident(model), mx.get_active_memory()])
        if ranks is None or ranks.leads:
            np.savez(Path(results) / f"{number}.npz", **found)
        model.close()
    if ranks is not None:
        ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
