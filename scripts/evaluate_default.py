"""Evaluates the shipped default beside its controls, from what the repository holds.

    python scripts/evaluate_default.py --limit 30        # minutes
    python scripts/evaluate_default.py --out docs        # the full table, and the plot in the docs
    python scripts/evaluate_default.py --before-healing  # a predictor alone: an hour or two

Two checkpoints of SmolLM2-135M-Instruct are made in the cache at first use: the shipped default (predictor, and the
adapter healed along with it), and healed static (`scripts/controls`: the adapter of a fixed selection, trained on the
same batches). `ifprune evaluate` prints the loss of the model as published, dense; then, per density, the losses of all
rows with paired intervals. `dense` is there the healed model with all its neurons, for which it was not tuned.

Before healing there is one checkpoint: the published weights and the predictor in `scripts/controls/before-healing`,
whose mean over training instructions is the static selection it is compared with (docs/log.md says how it was trained).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from ifprune_convert.embedded import cache_folder, embedded_gguf, ensure_embedded
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx.checkpoint.atomic_write import sha256_file

HERE = Path(__file__).parent
DATA = HERE.parent / "convert" / "ifprune_convert" / "data" / "smollm2-135m-instruct"
SELECTORS = "dense,learned,mismatched"
BEFORE_HEALING = "static,static-own,learned,mismatched,oracle"


def healed_static() -> Path:
    """The checkpoint of the healed static selection."""
    adapter = HERE / "controls" / "healed-static"
    target = cache_folder() / f"healed-static-{sha256_file(adapter / 'adapters.safetensors')[:8]}"
    if not target.is_dir():
        options = Options(dtype=mx.float32, density=0.5, adapter=adapter, prior=DATA / "prior.safetensors")
        convert(open_source(embedded_gguf(print)), target, options)
    return target


def before_healing() -> Path:
    """The checkpoint of the published weights with a predictor that was trained for them."""
    folder = HERE / "controls" / "before-healing"
    predictor, prior = folder / "predictor", folder / "prior.safetensors"
    made_from = (predictor / "head.safetensors", prior)
    target = cache_folder() / "-".join(["before-healing", *(sha256_file(file)[:8] for file in made_from)])
    if not target.is_dir():
        options = Options(dtype=mx.float32, density=0.5, predictor=predictor, prior=prior)
        convert(open_source(embedded_gguf(print)), target, options)
    return target


def main() -> None:
    """Run `ifprune evaluate` on every checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--densities", help="default: 0.27,0.5; before healing 0.5")
    parser.add_argument("--before-healing", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for quality.json and quality.svg")
    arguments = parser.parse_args()
    shared = ["--dtype", "float32", "--max-length", "256" if arguments.before_healing else "192"]
    for file in sorted((HERE / "held_out").glob("*.jsonl")):
        shared += ["--data", f"{file.stem}={file}"]
    if arguments.limit is not None:
        shared += ["--limit", str(arguments.limit)]
    evaluate = [sys.executable, "-m", "ifprune_cli.main", "evaluate"]
    if arguments.before_healing:
        if arguments.out is not None:
            parser.error("--out is for the shipped default; leave it out with --before-healing")
        command = [*evaluate, "--model", str(before_healing()), *shared, "--selectors", BEFORE_HEALING]
        command += ["--densities", arguments.densities or "0.5"]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    print("SmolLM2-135M-Instruct as published:", flush=True)
    base = ["--model", str(ensure_embedded(print, trained=False)), "--selectors", "dense"]
    subprocess.run([*evaluate, *base, *shared], check=True)
    print("\nThe shipped default beside its controls:", flush=True)
    command = [*evaluate, "--model", str(ensure_embedded(print)), "--healed-static", str(healed_static()), *shared]
    command += ["--selectors", SELECTORS, "--densities", arguments.densities or "0.27,0.5"]
    if arguments.out is not None:
        command += ["--json", str(arguments.out / "quality.json"), "--plot", str(arguments.out / "quality.svg")]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
