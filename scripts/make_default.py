"""Packs runs on the embedded model into what ships (predictor, adapter, prior) and what does not (the controls'
adapters, for `scripts/evaluate_default.py`), as float16.

    python scripts/make_default.py --learned RUN --static RUN --dense RUN [--out FOLDER]

The runs are what `ifprune train --stage sft --output RUN` wrote, with the arms `learned`, `static-learned` and `none`;
one run may have them all. Without --out the files of this repository are replaced: raise `_REVISION` in
`ifprune_convert/embedded.py` afterwards, or caches keep the old default. Prints the bytes.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.train.trainer import LEARNED_PRIOR

HERE = Path(__file__).parent
DEFAULT = HERE.parent / "convert" / "ifprune_convert" / "data" / "smollm2-135m-instruct"
CONTROLS = HERE / "controls"


def halved(source: Path, target: Path) -> None:
    """Copy a safetensors file, as float16."""
    arrays = load_arrays(source)
    mx.save_safetensors(str(target), {name: array.astype(mx.float16) for name, array in arrays.items()})


def copy_adapter(run: Path, arm: str, target: Path) -> None:
    """Copy what a run healed an arm by."""
    target.mkdir(parents=True, exist_ok=True)
    source = run / "adapters" / arm
    halved(source / "adapters.safetensors", target / "adapters.safetensors")
    shutil.copyfile(source / "adapter_config.json", target / "adapter_config.json")


def copy_head(run: Path, target: Path) -> None:
    """Copy a run's predictor."""
    target.mkdir(parents=True, exist_ok=True)
    head = Head.load(run / "predictor" / "head.safetensors")
    arrays = {name: getattr(head, name) for name in ("first", "first_bias", "second", "second_bias")}
    small = {name: array.astype(mx.float16) for name, array in arrays.items() if array is not None}
    replace(head, **small).save(target / "head.safetensors")


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learned", type=Path, required=True, help="run with the arm that ships")
    parser.add_argument("--static", type=Path, help="run with the arm static-learned")
    parser.add_argument("--dense", type=Path, help="run with the arm none")
    parser.add_argument("--out", type=Path, help="folder for all of it, instead of the repository's places")
    given = parser.parse_args()
    shipped, controls = (DEFAULT, CONTROLS) if given.out is None else (given.out / "default", given.out / "controls")
    copy_adapter(given.learned, "learned", shipped / "adapter")
    copy_head(given.learned, shipped / "predictor")
    halved(given.learned / "prior.safetensors", shipped / "prior.safetensors")
    if given.static is not None:
        copy_adapter(given.static, "static-learned", controls / "healed-static")
        halved(given.static / LEARNED_PRIOR, controls / "healed-static" / "prior.safetensors")
    if given.dense is not None:
        copy_adapter(given.dense, "none", controls / "healed-dense")
    print(f"{shipped}: {sum(file.stat().st_size for file in shipped.rglob('*') if file.is_file())} bytes")


if __name__ == "__main__":
    main()
