"""`ifprune bench`: how fast is this checkpoint here, dense and sliced?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from .console import note, progress, result_json
from .loading import load_model
from .options import DensityOption, DtypeOption, ModelOption, SeedOption, SelectorName


def bench(
    model: ModelOption = None,
    density: DensityOption = None,
    selector: Annotated[
        SelectorName, typer.Option("--selector", help="What chooses the neurons.")
    ] = SelectorName.random,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=2, help="Tokens to read.")] = 128,
    generation_tokens: Annotated[
        int, typer.Option("--generation-tokens", "-g", min=2, help="Tokens to generate.")
    ] = 32,
    num_trials: Annotated[int, typer.Option("--num-trials", "-n", min=1, help="Counted trials of each.")] = 7,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    json: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write one JSON line to FILE; - is stdout.")
    ] = None,
) -> None:
    """Time the model with all neurons and with a selection, in turn, and print medians."""
    from ifprune_mlx import IfpruneError, make_selector
    from ifprune_mlx.bench import bench as measure
    from ifprune_mlx.files import write_atomic

    if json is not None and json.is_dir():
        raise IfpruneError(f"--json {json}: is a folder; give a file, or - for stdout")
    if sys.platform == "linux" and "blas" not in os.environ.get("LD_PRELOAD", ""):
        note(
            "float32 is slow here: no BLAS is preloaded (on Debian: apt install libopenblas0-pthread, then make bench)"
        )
    loaded, _ = load_model(model, dtype, trust_remote_code=False)
    length, limit = prompt_tokens + generation_tokens, loaded.context_length
    if limit is not None and length > limit:
        raise IfpruneError(f"{length} tokens to read and generate: the model's context holds {limit}; give fewer")
    keep = loaded.keep(density)
    chooser = make_selector(loaded, selector.value, seed=seed)
    with progress("bench", "rounds") as update:
        result = measure(
            loaded,
            chooser,
            keep,
            prompt_tokens=prompt_tokens,
            generation_tokens=generation_tokens,
            trials=num_trials,
            progress=update,
        )
    if json is not None and str(json) != "-":
        import json as encoder

        text = encoder.dumps(result) + "\n"
        write_atomic(json, lambda file: file.write_text(text, encoding="utf-8"), IfpruneError)
    if json is None or str(json) != "-":
        print(f"{'':8}{'prefill tok/s':>15}{'decode tok/s':>14}{'select s':>10}{'switch s':>10}{'TTFT s':>8}")
        for row in result["rows"]:
            print(
                f"{row['name']:8}{row['prefill_tok_s']:>15.1f}{row['decode_tok_s']:>14.1f}"
                f"{row['select_s']:>10.3f}{row['switch_s']:>10.3f}{row['ttft_s']:>8.3f}"
            )
        share = result["ratios"]["decode_vs_dense_limit"]
        print(f"decoding gained {100 * share:.0f} % of what its fewer parameters allow; memory read at "
              f"{result['machine']['bandwidth'] / 1e9:.1f} GB/s")  # fmt: skip
    else:
        result_json(result)
