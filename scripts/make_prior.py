"""Makes the embedded model's shipped prior from a checkpoint that was converted with `--calibrate`.

ifprune convert --model SmolLM2-135M-Instruct.Q4_1.gguf --dtype float32 --calibrate --mlx-path calibrated
python scripts/make_prior.py calibrated convert/ifprune_convert/data/smollm2-135m-instruct-prior.safetensors
"""

from __future__ import annotations

import sys

import mlx.core as mx

from ifprune_mlx import Checkpoint


def main() -> None:
    """Copy the prior, as float16, with where it comes from."""
    folder, out = sys.argv[1:]
    checkpoint = Checkpoint.open(folder)
    if checkpoint.prior_method != "calibrated":
        raise SystemExit(f"{folder}: its prior is not calibrated; convert it with --calibrate")
    arrays = mx.load(str(checkpoint.priors_file))
    kept = {name: array.astype(mx.float16) for name, array in arrays.items() if name.startswith("prior.")}
    mx.save_safetensors(out, kept, {"method": "calibrated", "source": checkpoint.manifest["source"]})


if __name__ == "__main__":
    main()
