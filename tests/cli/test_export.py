"""`ifprune export` on the tiny checkpoint, and stock mlx-lm on what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Selection
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from tests.cli.process import environment
from tests.cli.test_generate import answer, succeed
from tests.tiny import write_checkpoint

KEYS = {
    "path", "bytes", "seconds", "selection", "selector", "density", "k", "parameters", "quantization", "down_quantized",
}  # fmt: skip
# A Python that has mlx-lm, and cannot import anything of ours even where it is installed.
_STOCK = (
    "import runpy, sys; sys.modules.update(dict.fromkeys(('ifprune_mlx', 'ifprune_convert', 'ifprune_cli'))); "
    "runpy.run_module('mlx_lm.generate', run_name='__main__', alter_sys=True)"
)


def stock_generate(model: Path, prompt: str, cache: Path) -> str:
    """What `mlx_lm.generate` answers, in a process of its own."""
    arguments = ["--model", model, "--prompt", prompt, "--max-tokens", "8", "--temp", "0"]
    without = {name: value for name, value in environment(cache).items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _STOCK, *arguments], capture_output=True, text=True, env=without, cwd=cache, check=False
    )
    assert done.returncode == 0, done.stderr
    # The answer stands between two rules.
    return done.stdout.split("=" * 10 + "\n")[1].removesuffix("\n")


@pytest.mark.parametrize("packing", [None, ("affine", 32, 4)], ids=["float", "4bit"])
def test_stock_mlx_lm_gives_the_same_answer(
    tiny_checkpoint: Path, tmp_path: Path, packing: tuple[str, int, int] | None
) -> None:
    folder = tiny_checkpoint
    if packing is not None:
        folder = write_checkpoint(tmp_path / "checkpoint", options=Options(quantization=quantization_of(*packing)))
    file, out = tmp_path / "s.safetensors", tmp_path / "out"
    succeed("select", "--model", folder, "--prompt", "hello", "--density", "0.5", "--save-to", file)
    done = succeed("export", "--model", folder, "--selection", file, "--mlx-path", out, "--json")
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    value, selection = answer(done), Selection.load(file)
    assert value.keys() == KEYS
    assert (value["path"], value["k"]) == (str(out), [64, 64])
    assert (value["selection"], value["selector"], value["density"]) == (selection.hash, "activation", 0.5)
    assert value["bytes"] == sum(entry.stat().st_size for entry in out.iterdir())
    assert value["quantization"] == (None if packing is None else {"group_size": 32, "bits": 4, "mode": "affine"})
    assert value["down_quantized"] is False
    assert value["seconds"] > 0

    options = ["--prompt", "hello", "--max-tokens", "8", "--json"]
    ours = answer(succeed("generate", "--model", folder, "--selection", file, *options))
    assert value["parameters"] == ours["active_parameters"]
    assert stock_generate(out, "hello", tmp_path) == ours["text"]


def test_a_prompt_selects_as_it_does_elsewhere(tiny_checkpoint: Path, tmp_path: Path) -> None:
    how = ("--model", tiny_checkpoint, "--prompt", "-", "--system-prompt", "Be brief.", "--active-params", "90K")
    selected = answer(succeed("select", *how, "--json", stdin=b"write a poem"))
    exported = answer(succeed("export", *how, "--mlx-path", tmp_path / "out", "--json", stdin=b"write a poem"))
    assert {key: exported[key] for key in ("selection", "selector", "density", "k")} == {
        key: selected[key] for key in ("selection", "selector", "density", "k")
    }
    assert exported["parameters"] <= 90_000
    again = ("export", "--model", tiny_checkpoint, "--prompt", "x", "--mlx-path", tmp_path / "out", "--overwrite")
    value = answer(succeed(*again, "--selector", "static", "--density", "0.25", "--dtype", "bfloat16", "--json"))
    assert (value["selector"], value["k"]) == ("static", [32, 32])
    arrays = load_arrays(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert {array.dtype for array in arrays.values()} == {mx.bfloat16}


def test_plain_output_is_the_folder(tmp_path: Path) -> None:
    quantized = Options(quantization=quantization_of("mxfp4", None, None))
    folder, out = write_checkpoint(tmp_path / "checkpoint", options=quantized), tmp_path / "a b" / "out"
    how = ("export", "--model", folder, "--prompt", "x", "--density", "0.5", "--mlx-path", out)
    done = succeed(*how)
    assert done.stdout == f"{out}\n"
    assert f"try: mlx_lm.generate --model {out}" in done.stderr
    assert "--requantize-down packs them" in done.stderr
    assert out.stat().st_mode & 0o777 == 0o755
    done = succeed(*how, "--overwrite", "--requantize-down")
    assert "--requantize-down" not in done.stderr
    assert json.loads((out / "config.json").read_text())["quantization"] == {
        "group_size": 32, "bits": 4, "mode": "mxfp4"
    }  # fmt: skip
