"""Packs a paired run on the embedded model into what ships (predictor, adapter, prior) and what does not (the static
arm's adapter, for `scripts/evaluate_default.py`), as float16.

    python scripts/make_default.py --run RUN_FOLDER

RUN_FOLDER is what `ifprune train --stage sft --output RUN_FOLDER` wrote. Prints the bytes. Raise `_REVISION` in
`ifprune_convert/embedded.py` afterwards, or caches keep the old default.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.selection.predictor import Head

HERE = Path(__file__).parent
TARGET = HERE.parent / "convert" / "ifprune_convert" / "data" / "smollm2-135m-instruct"


def halved(source: Path, target: Path) -> None:
    """Copy a safetensors file, as float16."""
    arrays = load_arrays(source)
    mx.save_safetensors(str(target), {name: array.astype(mx.float16) for name, array in arrays.items()})


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    run = parser.parse_args().run
    (TARGET / "predictor").mkdir(parents=True, exist_ok=True)
    for arm, folder in (("learned", TARGET / "adapter"), ("static", HERE / "controls" / "healed-static")):
        folder.mkdir(parents=True, exist_ok=True)
        adapter = run / "adapters" / arm
        halved(adapter / "adapters.safetensors", folder / "adapters.safetensors")
        shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    halved(run / "prior.safetensors", TARGET / "prior.safetensors")
    head = Head.load(run / "predictor" / "head.safetensors")
    arrays = {name: getattr(head, name) for name in ("first", "first_bias", "second", "second_bias")}
    small = {name: array.astype(mx.float16) for name, array in arrays.items()}
    replace(head, **small).save(TARGET / "predictor" / "head.safetensors")
    print(f"{TARGET}: {sum(file.stat().st_size for file in TARGET.rglob('*') if file.is_file())} bytes")


if __name__ == "__main__":
    main()
