"""Bad input to `ifprune convert`: sources, options, priors, predictors, outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.convert import convert as mlx_lm_convert

from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from tests.cli.bad_input.table import Bad, Check, Place, Table, cut, edit_json
from tests.cli.process import full_disk
from tests.family_configs import tiny_config
from tests.tiny import write_source
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
def unknown_model_type(at: Place) -> Bad:
    folder = at.dense(model_type="gpt9")
    return Bad(at.convert(folder), (str(folder), "'gpt9'", "update mlx-lm"))


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
    arrays = load_arrays(folder / "model.safetensors")
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
    arrays = load_arrays(at.sound / "priors.safetensors")
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


# Predictors of PyTorch.


def torch_predictor(at: Place, neurons: int) -> Path:
    """The heads of a predictor in PyTorch's layout, without its backbone."""
    folder = at / "torch"
    folder.mkdir()
    heads = {"prediction_head1.weight": mx.zeros((16, 64)), "prediction_head2.weight": mx.zeros((neurons, 16))}
    mx.save_safetensors(str(folder / "predictor.safetensors"), heads, {"format": "pt"})
    return folder


@case
def predictor_of_pytorch_as_pickles(at: Place) -> Bad:
    folder = at / "torch"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    file = pickle_file(at, "torch/pytorch_model.bin")
    return Bad(at.convert(at.source, "--predictor", folder), (str(file), "pickle", "never opened", "safetensors"))


@case
def predictor_of_pytorch_for_another_model(at: Place) -> Bad:
    folder = torch_predictor(at, 3 * 128)
    words = (str(folder), "[384, 16]", "256 neurons", "trained for another model", "--predictor")
    return Bad(at.convert(at.source, "--predictor", folder), words)


@case
def predictor_of_pytorch_without_its_config(at: Place) -> Bad:
    folder = torch_predictor(at, 2 * 128)
    return Bad(at.convert(at.source, "--predictor", folder), (str(folder), "no config.json", "copy the backbone's"))


@case
def predictor_whose_head_is_cut_short(at: Place) -> Bad:
    folder = write_predictor(at / "predictor")
    cut(folder / "head.safetensors")
    words = (str(folder / "head.safetensors"), "cut short", "again")
    return Bad(at.convert(at.source, "--predictor", folder), words)


@case
def model_as_predictor(at: Place) -> Bad:
    words = (str(at.source), "give the folder of a trained sparsity predictor")
    return Bad(at.convert(at.source, "--predictor", at.source), words)


# Models that mlx-lm quantized.


def packed(at: Place) -> Path:
    """The sound dense folder as `mlx_lm.convert -q` makes it: groups of 64, 4 bits."""
    mlx_lm_convert(str(at.source), str(at / "packed"), quantize=True, q_group_size=64, q_bits=4)
    return at / "packed"


@case
def quantizing_what_is_quantized(at: Place) -> Bad:
    folder = packed(at)
    return Bad(at.convert(folder, "-q"), (str(folder), "is quantized already", "leave out --quantize"))


@case
def quantized_source(at: Place) -> Bad:
    """One whose groups lack their offsets."""
    folder, name = packed(at), "model.layers.1.mlp.up_proj.biases"
    arrays = load_arrays(folder / "model.safetensors")
    mx.eval(arrays)
    del arrays[name]
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    return Bad(at.convert(folder), (str(folder), f"lacks {name}", "its quantization asks for", "again"))


@case
def quantized_source_whose_config_says_other_bits(at: Place) -> Bad:
    folder = packed(at)
    edit_json(folder / "config.json", lambda config: config["quantization"].update(bits=8))
    return Bad(at.convert(folder), (str(folder), "is not packed in 8 bits and groups of 64", "different models"))


@case
def quantized_source_whose_config_says_another_mode(at: Place) -> Bad:
    folder = packed(at)
    edit_json(folder / "config.json", lambda config: config["quantization"].update(mode="int1"))
    return Bad(at.convert(folder), (str(folder / "config.json"), "`quantization` cannot be used", "unquantized model"))


@case
def source_that_gptq_quantized(at: Place) -> Bad:
    folder = at.dense(quantization_config={"quant_method": "gptq", "bits": 4})
    return Bad(at.convert(folder), (str(folder), "another way than mlx-lm's", "unquantized checkpoint"))


@case
def float_down_of_floats(at: Place) -> Bad:
    words = (str(at.source), "is not quantized", "leave out --float-down")
    return Bad(at.convert(at.source, "--float-down"), words)


# Families that cannot be sliced.

GPT2 = {
    "model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 320,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def of_family(at: Place, model_type: str) -> Path:
    config = tiny_config(model_type)
    assert config is not None
    return write_source(at / "family", **config)


@case
def mixture_of_experts_alone(at: Place) -> Bad:
    words = ("olmoe cannot be sliced", "expert", "use it with mlx-lm itself")
    return Bad(at.convert(of_family(at, "olmoe")), words)


@case
def model_without_gates(at: Place) -> Bad:
    words = ("gpt2 cannot be sliced", "gate", "use it with mlx-lm itself")
    return Bad(at.convert(write_source(at / "family", **GPT2)), words)


@case
def model_that_mixes_its_neurons(at: Place) -> Bad:
    return Bad(at.convert(of_family(at, "gemma3n")), ("gemma3n cannot be sliced", "use it with mlx-lm itself"))


@case
def model_with_code_of_its_own(at: Place) -> Bad:
    folder = at.dense(model_file="odd.py")
    (folder / "odd.py").write_text("raise SystemExit")
    return Bad(at.convert(folder, "--trust-remote-code"), (str(folder), "its own code (odd.py)", "family that mlx-lm"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
