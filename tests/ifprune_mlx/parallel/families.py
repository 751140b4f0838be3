"""One rank: `python -m tests.ifprune_mlx.parallel.families FOLDER` compares each family's logits with one process's.

FOLDER holds a checkpoint for each family, with the logits of one process beside it; rank 0 prints a line for each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Model
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.model import load_checkpoint
from ifprune_mlx.parallel.ranks import join
from tests.family_configs import tiny_config, write_family
from tests.ifprune_mlx.reference import random_selection

PROMPT = [5, 17, 200, 9, 33, 41, 8]


def prepare(folder: Path, model_type: str) -> None:
    """A family's checkpoint and logits."""
    if tiny_config(model_type) is None:
        raise IfpruneError("no config for tests")
    write_family(folder / f"source-{model_type}", model_type)
    convert(open_source(folder / f"source-{model_type}"), folder / model_type, Options())
    model = load_checkpoint(Checkpoint.open(folder / model_type))
    select(model)
    np.save(folder / f"{model_type}.npy", np.array(logits(model)))
    model.close()


def select(model: Model) -> None:
    """Half of the neurons, arbitrarily."""
    widths = model.checkpoint.widths
    model.switch(random_selection(widths, [width // 2 for width in widths], 3))


def logits(model: Model) -> mx.array:
    """Of the last tokens, after others were read as mlx-lm reads a prompt: only the caches are computed."""
    cache = model.make_cache()
    for part in (PROMPT[:3], PROMPT[3:]):
        model(mx.array([part]), cache=cache)
        mx.eval([layer.state for layer in cache])
    return model(mx.array([[7]]), cache=cache)


def main(folder: Path) -> None:
    """See the module."""
    ranks = join(lambda line: (print(line), os._exit(1)))
    assert ranks is not None
    for file in sorted(folder.glob("*.npy")):
        try:
            with ranks.together():
                try:
                    model = load_checkpoint(Checkpoint.open(folder / file.stem), ranks=ranks)
                except IfpruneError:
                    raise
                except Exception as exc:
                    raise IfpruneError(f"loading: {exc!r}") from exc
            select(model)
            far = float(np.abs(np.array(logits(model)) - np.load(file)).max())
            split = any("attention" in layer.get("self_attn", ()) for layer in model.module.layers)
            kind = "layers" if split else "heads or whole"
            line = f"{file.stem}: {far:.1e} ({kind})"
        except IfpruneError as exc:
            line = f"{file.stem}: refused, {exc}"
        if ranks.leads:
            print(line, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
