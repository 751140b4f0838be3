"""An evaluation as JSON that gives all of it back, for a job that is killed after measuring it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ifprune_mlx.eval.evaluation import Evaluation, Row
from ifprune_mlx.eval.metrics import Overlap


def to_json(found: Evaluation) -> dict[str, Any]:
    """Everything but tasks; floats keep their last digit."""
    return {
        "density": found.density,
        "matched": found.matched,
        "seed": found.seed,
        "keys": found.keys,
        "rows": [
            {
                "selector": row.selector,
                "domain": row.domain,
                "per_prompt": row.per_prompt,
                "tokens": row.tokens,
                "accepted": row.accepted,
            }
            for row in found.rows
        ],
        "overlap": {
            name: {
                "chance": overlap.chance,
                "domains": {
                    a: {b: None if layers is None else layers.tolist() for b, layers in row.items()}
                    for a, row in overlap.domains.items()
                },
            }
            for name, overlap in found.overlap.items()
        },
    }


def from_json(kept: Mapping[str, Any]) -> Evaluation:
    """What `to_json` was given."""
    return Evaluation(
        density=kept["density"],
        matched=kept["matched"],
        seed=kept["seed"],
        keys={domain: tuple(keys) for domain, keys in kept["keys"].items()},
        rows=tuple(
            Row(
                row["selector"],
                row["domain"],
                tuple(row["per_prompt"]),
                tuple(row["tokens"]),
                None if row["accepted"] is None else tuple(row["accepted"]),
            )
            for row in kept["rows"]
        ),
        overlap={
            name: Overlap(
                {
                    a: {b: None if layers is None else np.array(layers) for b, layers in row.items()}
                    for a, row in overlap["domains"].items()
                },
                overlap["chance"],
            )
            for name, overlap in kept["overlap"].items()
        },
    )
