"""Bad input to `ifprune convert`: sources, options, priors, predictors, outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from tests.cli.bad_input.table import (
    Bad,
    Check,
    Place,
    Table,
    cut,
)
from tests.cli.process import full_disk
from tests.tiny_predictor import write_predictor

TABLE = Table()
case = TABLE.case


# Predictors.


@case
def predictor_for_another_model(at: Place) -> Bad:
    folder = write_predictor(at / "predictor", (128, 64))
    return Bad(at.convert(at.source, "--predictor", folder), (str(folder), "trained for another model", "--predictor"))


@case
def missing_predictor(at: Place) -> Bad:
    return Bad(
        at.convert(at.source, "--predictor", at / "none"),
        (str(at / "none"), "no such predictor", "give the folder"),
    )


# Budgets and options.


@case
def density_nan(at: Place) -> Bad:
    return Bad(at.convert(at.source, "--density", "nan"), ("density nan", "above 0 and at most 1"))


@case
def negative_bits(at: Place) -> Bad:
    return Bad(at.convert(at.source, "-q", "--q-bits", "-4"), ("-4 bits", "2, 3, 4, 5, 6 or 8"))


# Sources that cannot be converted.


def pickle_file(at: Place, name: str) -> Path:
    file = at / name
    file.write_bytes(b"\x80\x04cos\nsystem\n")
    return file


@case
def pickled_bin_file(at: Place) -> Bad:
    file = pickle_file(at, "model.bin")
    return Bad(at.convert(file), (str(file), "pickle", "safetensors or GGUF"))


@case
def pickled_pt_file(at: Place) -> Bad:
    file = pickle_file(at, "model.pt")
    return Bad(at.convert(file), (str(file), "pickle", "safetensors or GGUF"))


@case
def folder_with_pickles_only(at: Place) -> Bad:
    folder = at.dense()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return Bad(at.convert(folder), (str(folder), "pickle", "safetensors or GGUF"))


@case
def missing_source(at: Place) -> Bad:
    return Bad(at.convert(at / "nowhere"), (str(at / "nowhere"), "no such file or folder", "hf download"))


@case
def source_shard_cut_short(at: Place) -> Bad:
    folder = at.dense()
    cut(folder / "model.safetensors")
    return Bad(at.convert(folder), (str(folder / "model.safetensors"), "cut short", "again"))


@case
def gguf_cut_in_the_middle(at: Place) -> Bad:
    file = at.gguf()
    cut(file, file.stat().st_size // 2)
    return Bad(at.convert(file), (str(file), "cut short", "again"))


@case
def gguf_with_a_wrong_magic(at: Place) -> Bad:
    file = at.gguf()
    file.write_bytes(b"GGUX" + file.read_bytes()[4:])
    return Bad(at.convert(file), (str(file), "is not a GGUF file", "again"))


@case
def gguf_of_an_unknown_architecture(at: Place) -> Bad:
    file = at.gguf(general__architecture="mamba")
    return Bad(at.convert(file), (str(file), "'mamba'", "llama, qwen2, qwen3"))


@case
def unknown_model_type(at: Place) -> Bad:
    folder = at.dense(model_type="gpt9")
    return Bad(at.convert(folder), (str(folder), "'gpt9'", "update mlx-lm"))


@case
def quantized_source(at: Place) -> Bad:
    folder = at.dense(quantization={"group_size": 64, "bits": 4})
    return Bad(at.convert(folder), (str(folder), "is quantized", "unquantized checkpoint"))


@case
def ifp_checkpoint_as_source(at: Place) -> Bad:
    return Bad(at.convert(at.sound), (str(at.sound), "is an IFP checkpoint already", "dense model"))


@case
def source_without_a_tokenizer(at: Place) -> Bad:
    folder = at.dense()
    (folder / "tokenizer.json").unlink()
    return Bad(at.convert(folder), (str(folder), "no tokenizer", "download"))


@case
def source_with_a_damaged_tokenizer(at: Place) -> Bad:
    folder = at.dense()
    cut(folder / "tokenizer.json")
    return Bad(at.convert(folder), (str(folder / "tokenizer.json"), "not valid JSON", "again"))


@case
def source_with_a_tokenizer_of_another_kind(at: Place) -> Bad:
    folder = at.dense()
    (folder / "tokenizer.json").write_text("{}")
    return Bad(at.convert(folder), (str(folder), "its tokenizer cannot be loaded", "again"))


@case
def source_config_that_is_not_json(at: Place) -> Bad:
    folder = at.dense()
    (folder / "config.json").write_text("model_type: llama")
    return Bad(at.convert(folder), (str(folder / "config.json"), "not valid JSON", "again"))


@case
def weights_with_nan(at: Place) -> Bad:
    folder = at.dense()
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    return Bad(at.convert(folder), (str(folder), "model.layers.1.mlp", "NaN", "again"))


# Conversion options.


@case
def bits_without_quantize(at: Place) -> Bad:
    return Bad(at.convert(at.source, "--q-bits", "4"), ("--q-bits", "need --quantize (-q)"))


@case
def group_size_that_does_not_divide_the_width(at: Place) -> Bad:
    arguments = at.convert(at.source, "-q", "--q-group-size", "128")
    return Bad(arguments, ("model.layers.0.mlp", "groups of 128", "--q-group-size"))


@case
def bits_that_the_mode_lacks(at: Place) -> Bad:
    return Bad(at.convert(at.source, "-q", "--q-mode", "mxfp4", "--q-bits", "8"), ("mxfp4", "4 bits", "8 bits"))


@case
def calibration_with_a_corrupt_line(at: Place) -> Bad:
    file = at / "chats.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"\n')
    return Bad(at.convert(at.source, "--calibrate", file), (f"{file}, line 3", "not a chat", "expected JSON"))


@case
def calibration_without_chats(at: Place) -> Bad:
    file = at / "chats.jsonl"
    file.write_text("\n")
    return Bad(at.convert(at.source, "--calibrate", file), (str(file), "holds no chats", "give JSON lines"))


# Ready priors.


def prior(at: Place, change: Callable[[dict[str, mx.array]], object]) -> Path:
    """A copy of the sound checkpoint's prior, changed."""
    arrays = mx.load(str(at.sound / "priors.safetensors"))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(at / "prior.safetensors"), arrays)
    return at / "prior.safetensors"


@case
def missing_prior(at: Place) -> Bad:
    file = at / "none.safetensors"
    return Bad(at.convert(at.source, "--prior", file), (str(file), "no such prior file", "give one"))


@case
def prior_cut_short(at: Place) -> Bad:
    file = prior(at, lambda tensors: None)
    cut(file, 7)
    return Bad(at.convert(at.source, "--prior", file), (str(file), "cut short", "again"))


@case
def prior_of_a_shallower_model(at: Place) -> Bad:
    file = prior(at, lambda tensors: tensors.pop("prior.1"))
    return Bad(at.convert(at.source, "--prior", file), (str(file), "lacks prior.1", "2 FFNs", "give one"))


@case
def prior_of_a_wider_model(at: Place) -> Bad:
    file = prior(at, lambda tensors: tensors.update({"prior.1": mx.zeros((192,))}))
    return Bad(at.convert(at.source, "--prior", file), (str(file), "prior.1", "[192]", "[128]", "give one"))


@case
def prior_with_nan(at: Place) -> Bad:
    file = prior(at, lambda tensors: tensors.update({"prior.1": mx.full((128,), mx.nan)}))
    return Bad(at.convert(at.source, "--prior", file), (str(file), "prior.1", "NaN", "measure the prior again"))


@case
def negative_prior(at: Place) -> Bad:
    file = prior(at, lambda tensors: tensors.update({"prior.0": -tensors["prior.0"]}))
    return Bad(at.convert(at.source, "--prior", file), (str(file), "prior.0", "negative", "measure the prior again"))


@case
def prior_and_calibration(at: Place) -> Bad:
    file = prior(at, lambda tensors: None)
    arguments = at.convert(at.source, "--prior", file, "--calibrate")
    return Bad(arguments, ("--prior", "--calibrate", "give one of them", "ifprune convert --help"), code=2)


# Outputs.


@case
def output_that_exists(at: Place) -> Bad:
    at.checkpoint().rename(at / "out")
    return Bad(at.convert(at.source), (str(at / "out"), "already exists", "--overwrite"))


@case
def output_below_a_file(at: Place) -> Bad:
    (at / "out").write_text("a file")
    arguments = [*at.convert(at.source), "--mlx-path", at / "out" / "model"]
    return Bad(arguments, (str(at / "out" / "model"), "cannot be written", "write elsewhere"))


@case
def output_where_nothing_can_be_made(at: Place) -> Bad:
    where = "/proc/ifprune/model" if os.path.isdir("/proc") else "/dev/null/model"  # noqa: PTH112
    return Bad([*at.convert(at.source), "--mlx-path", where], (where, "cannot be written", "write elsewhere"))


@case
def overwriting_what_is_no_checkpoint(at: Place) -> Bad:
    (at / "out").mkdir()
    (at / "out" / "thesis.txt").write_text("years of work")
    return Bad(at.convert(at.source, "--overwrite"), (str(at / "out"), "is not an IFP checkpoint", "choose another"))


@case
def overwriting_the_source(at: Place) -> Bad:
    folder = at.dense()
    arguments = [*at.convert(folder, "--overwrite"), "--mlx-path", folder]
    return Bad(arguments, (str(folder), "is not an IFP checkpoint", "choose another"))


@case
def full_disk_for_a_conversion(at: Place) -> Bad:
    return Bad(at.convert(at.source), (str(at / "out"), "cannot be written", "free space"), prelude=full_disk(50_000))


@case
def full_disk_for_an_overwrite(at: Place) -> Bad:
    at.checkpoint().rename(at / "out")
    words = (str(at / "out"), "cannot be written", "free space", "nothing was changed")
    return Bad(at.convert(at.source, "--overwrite"), words, prelude=full_disk(5_000))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
