"""Bad input through the real command line.

Each case builds its input in a folder of its own. The process must then end with 1 or 2, print nothing on stdout and
one error line on stderr that says what, where and what to do, and leave the folder as it found it: no output, no
half-written file, no hidden leftover.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.export import export_selection
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, Selection, TaskStore
from ifprune_mlx.checkpoint import write_manifest
from tests.cli.process import Argument, full_disk, run
from tests.convert.tiny_adapter import write_adapter
from tests.tiny import write_checkpoint
from tests.tiny_gguf import CONFIG as GGUF_CONFIG
from tests.tiny_gguf import make_model, write_gguf
from tests.tiny_predictor import write_predictor


@dataclass(frozen=True)
class Bad:
    """A command that must fail, and what its error line must contain."""

    arguments: list[Argument]
    words: tuple[str, ...]
    code: int = 1
    stdin: bytes = b""
    env: dict[str, str] = field(default_factory=dict)
    prelude: str | None = None


class Place:
    """A case's own folder, and sound inputs to damage in it."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder = folder
        self._shared = shared

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def sound(self) -> Path:
        """A sound checkpoint, shared by all cases."""
        return self._shared / "checkpoint"

    @property
    def source(self) -> Path:
        """A sound dense folder, shared by all cases."""
        return self._shared / "source-of-checkpoint"

    def checkpoint(self) -> Path:
        """A copy of the checkpoint, to be damaged."""
        return Path(shutil.copytree(self.sound, self / "checkpoint"))

    def dense(self, **changes: Any) -> Path:
        """A copy of the dense folder, its config changed."""
        folder = Path(shutil.copytree(self.source, self / "dense"))
        edit_json(folder / "config.json", lambda config: config.update(changes))
        return folder

    def gguf(self, **metadata: Any) -> Path:
        """A GGUF file, its metadata changed."""
        config = {**GGUF_CONFIG, "model_type": "llama"}
        edit = lambda values, tensors: values.update({k.replace("__", "."): v for k, v in metadata.items()})  # noqa: E731
        return write_gguf(self / "model.gguf", config, make_model(config), edit=edit)

    def generate(self, model: Argument, *more: Argument, prompt: Argument = "hello") -> list[Argument]:
        return ["generate", "--json", "--model", model, "--prompt", prompt, *more]

    def convert(self, source: Argument, *more: Argument) -> list[Argument]:
        return ["convert", "--json", "--model", source, "--mlx-path", self / "out", *more]

    def select(self, *more: Argument) -> list[Argument]:
        return ["select", "--json", "--model", self.sound, "--prompt", "hello", *more]


CASES: dict[str, Callable[[Place], Bad]] = {}


def case(build: Callable[[Place], Bad]) -> Callable[[Place], Bad]:
    CASES[build.__name__] = build
    return build


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(file: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Change a checkpoint's tensors; the manifest is made to agree."""
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})
    write_manifest(file.parent, source="test", licence=None)


def cut(file: Path, count: int = 100) -> None:
    file.write_bytes(file.read_bytes()[:-count])


# A damaged checkpoint.

MODEL, NEURONS = "model-00001-of-00001.safetensors", "neurons-00002-of-00002.safetensors"


@case
def shard_of_another_size_than_the_manifest_says(at: Place) -> Bad:
    folder = at.checkpoint()
    cut(folder / MODEL)
    return Bad(at.generate(folder), (str(folder / MODEL), "manifest.json says", "copy or convert"))


@case
def shard_cut_short_though_the_manifest_agrees(at: Place) -> Bad:
    folder = at.checkpoint()
    cut(folder / NEURONS)
    write_manifest(folder, source="test", licence=None)
    return Bad(at.generate(folder), (str(folder / NEURONS), "cut short", "again"))


@case
def manifest_with_a_wrong_size(at: Place) -> Bad:
    folder = at.checkpoint()
    edit_json(folder / "manifest.json", lambda manifest: manifest["files"]["tokenizer.json"].update(size=7))
    return Bad(["info", "--model", folder], ("tokenizer.json", "manifest.json says 7", "again"))


@case
def file_that_the_manifest_lists_is_missing(at: Place) -> Bad:
    folder = at.checkpoint()
    (folder / "priors.safetensors").unlink()
    return Bad(at.generate(folder), ("priors.safetensors: missing", "again"))


@case
def no_manifest(at: Place) -> Bad:
    folder = at.checkpoint()
    (folder / "manifest.json").unlink()
    return Bad(at.generate(folder), (str(folder), "did not finish", "convert the source again"))


@case
def neurons_tensor_missing(at: Place) -> Bad:
    folder = at.checkpoint()
    edit_tensors(folder / NEURONS, lambda arrays: arrays.pop("down.weight"))
    return Bad(at.generate(folder), (NEURONS, "tensor down.weight is missing", "convert"))


@case
def model_tensor_missing(at: Place) -> Bad:
    folder = at.checkpoint()
    edit_tensors(folder / MODEL, lambda arrays: arrays.pop("model.norm.weight"))
    return Bad(at.generate(folder), (str(folder), "model.norm.weight", "convert the source again"))


@case
def tensor_of_the_wrong_shape(at: Place) -> Bad:
    folder = at.checkpoint()
    edit_tensors(folder / NEURONS, lambda arrays: arrays.update({"down.weight": arrays["down.weight"][:-1]}))
    return Bad(["info", "--model", folder], (NEURONS, "[127, 64]", "[128, 64]", "convert the source again"))


@case
def unknown_format_version(at: Place) -> Bad:
    folder = at.checkpoint()
    edit_json(folder / "config.json", lambda config: config["ifpruning"].update(format_version=2))
    return Bad(["info", "--model", folder], ("config.json", "format version 2", "update ifprune-mlx"))


@case
def unknown_key_in_the_section(at: Place) -> Bad:
    folder = at.checkpoint()
    edit_json(folder / "config.json", lambda config: config["ifpruning"].update(novel=1))
    return Bad(["info", "--model", folder], ("config.json", "unknown key 'novel'", "update ifprune-mlx"))


@case
def config_that_is_not_json(at: Place) -> Bad:
    folder = at.checkpoint()
    (folder / "config.json").write_text('{"model_type": ')
    return Bad(["info", "--model", folder], ("config.json", "not valid JSON", "again"))


@case
def damaged_tokenizer(at: Place) -> Bad:
    folder = at.checkpoint()
    cut(folder / "tokenizer.json")
    write_manifest(folder, source="test", licence=None)
    return Bad(at.generate(folder), (str(folder), "the tokenizer cannot be loaded", "convert the source again"))


@case
def flipped_byte_found_by_verify(at: Place) -> Bad:
    folder = at.checkpoint()
    content = bytearray((folder / NEURONS).read_bytes())
    content[-5] ^= 1
    (folder / NEURONS).write_bytes(content)
    return Bad(["info", "--verify", "--model", folder], (str(folder), NEURONS, "sha256", "again"))


@case
def plain_model_folder(at: Place) -> Bad:
    return Bad(at.generate(at.source), ("config.json", "no ifpruning section", "ifprune convert"))


@case
def missing_model_folder(at: Place) -> Bad:
    return Bad(at.generate(at / "nowhere"), (str(at / "nowhere"), "no such folder", "ifprune convert"))


@case
def file_as_model(at: Place) -> Bad:
    file = at.sound / "config.json"
    return Bad(at.generate(file), (str(file), "is a file", "give the folder"))


@case
def hub_id_while_offline(at: Place) -> Bad:
    return Bad(at.generate("someone/some-model"), ("someone/some-model", "cannot be reached", "give a local"))


# Predictors.


@case
def predictor_for_another_model(at: Place) -> Bad:
    folder = write_predictor(at / "predictor", (128, 64))
    return Bad(at.convert(at.source, "--predictor", folder), (str(folder), "trained for another model", "--predictor"))


@case
def predictor_with_nan_in_its_head(at: Place) -> Bad:
    write_predictor(at / "predictor", poison=True)
    convert(open_source(at.source), at / "checkpoint", Options(predictor=at / "predictor"))
    where = str(at / "checkpoint" / "predictor")
    return Bad(at.generate(at / "checkpoint"), (where, "scores contain NaN", "convert"))


@case
def missing_predictor(at: Place) -> Bad:
    return Bad(
        at.convert(at.source, "--predictor", at / "none"),
        (str(at / "none"), "no such predictor", "give the folder"),
    )


@case
def learned_selector_without_a_predictor(at: Place) -> Bad:
    words = (str(at.sound), "no trained predictor", "--selector activation")
    return Bad(at.generate(at.sound, "--selector", "learned"), words)


# Budgets and options.


@case
def density_0(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--density", "0"), ("density 0", "above 0 and at most 1"))


@case
def density_2(at: Place) -> Bad:
    return Bad(at.select("--density", "2"), ("density 2", "above 0 and at most 1"))


@case
def density_nan(at: Place) -> Bad:
    return Bad(at.convert(at.source, "--density", "nan"), ("density nan", "above 0 and at most 1"))


@case
def density_abc(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--density", "abc"), ("--density", "valid number", "--help"), code=2)


@case
def too_few_active_parameters(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--active-params", "1k"), ("1,000 active parameters", "give at least"))


@case
def active_parameters_that_are_no_number(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--active-params", "3 apples"), ("--active-params", "'3 apples'", "write it like"))


@case
def too_little_memory(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--memory", "1KB"), ("memory budget", "raise the budget"))


@case
def density_and_active_parameters(at: Place) -> Bad:
    arguments = at.generate(at.sound, "--density", "0.5", "--active-params", "90K")
    return Bad(arguments, ("--density and --active-params", "give one of them"))


@case
def no_tokens_at_all(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--max-tokens", "0"), ("max tokens is 0", "above 0"))


@case
def negative_temperature(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--temp", "-1"), ("--temp >= 0",))


@case
def selection_and_selector(at: Place) -> Bad:
    arguments = at.generate(at.sound, "--selection", at / "s.safetensors", "--selector", "static")
    return Bad(arguments, ("--selection and --selector", "give one of them"))


@case
def unknown_option(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--desnity", "1"), ("--desnity", "ifprune generate --help"), code=2)


@case
def negative_seed(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--seed", "-1"), ("--seed", "0"), code=2)


@case
def more_top_k_than_tokens(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--temp", "1", "--top-k", "9999"), ("--top-k 9999", "give fewer"))


@case
def negative_bits(at: Place) -> Bad:
    return Bad(at.convert(at.source, "-q", "--q-bits", "-4"), ("-4 bits", "2, 3, 4, 5, 6 or 8"))


@case
def bench_beyond_the_context(at: Place) -> Bad:
    return Bad(["bench", "--model", at.sound, "-p", "999999999"], ("context holds 512", "give fewer"))


@case
def no_tokens_for_a_question(at: Place) -> Bad:
    arguments = ["evaluate", "--model", at.sound, "--exact", "x=x.jsonl", "--max-tokens", "0"]
    return Bad(arguments, ("--max-tokens", "--help"), code=2)


@case
def question_with_gold_out_of_range(at: Place) -> Bad:
    file = at / "questions.jsonl"
    file.write_text(
        '{"query": "q", "choices": ["a", "b"], "gold": 0}\n{"query": "q", "choices": ["a", "b"], "gold": 2}\n'
    )
    words = (f"{file}, line 2", "gold is no index of its 2 options", "expected query, choices and gold")
    return Bad(["evaluate", "--model", at.sound, "--choices", f"x={file}"], words)


@case
def unknown_command(at: Place) -> Bad:
    return Bad(["trian"], ("trian", "ifprune --help"), code=2)


# Prompts.


@case
def empty_prompt(at: Place) -> Bad:
    return Bad(at.generate(at.sound, prompt=""), ("the prompt is empty", "write something"))


@case
def blank_prompt_from_stdin(at: Place) -> Bad:
    return Bad(at.generate(at.sound, prompt="-"), ("the prompt is empty", "write something"), stdin=b" \n\t\n")


@case
def prompt_longer_than_the_context(at: Place) -> Bad:
    words = ("the prompt has", "context holds 512", "shorten")
    return Bad(at.generate(at.sound, prompt="-"), words, stdin=b"word " * 200)


@case
def prompt_longer_than_the_context_for_select(at: Place) -> Bad:
    words = ("the prompt has", "context holds 512", "shorten")
    return Bad([*at.select(), "--prompt", "word " * 200, "--save-to", at / "s.safetensors"], words)


@case
def stdin_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.generate(at.sound, prompt="-"), ("stdin, byte 3", "not UTF-8", "iconv"), stdin=b"caf\xe9 au lait")


@case
def argument_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.generate(at.sound, prompt=b"caf\xe9"), ("--prompt is not UTF-8", "--prompt -"))


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


# Adapters to fuse.

ADAPTER, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"


def adapter(at: Place, change: Callable[[dict[str, mx.array]], object] = lambda tensors: None, **options: Any) -> Path:
    """An adapter of the sound dense folder, its tensors changed."""
    folder = write_adapter(at / "adapter", at.source, **options)
    arrays = mx.load(str(folder / ADAPTER))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(folder / ADAPTER), arrays)
    return folder


@case
def missing_adapter(at: Place) -> Bad:
    return Bad(at.convert(at.source, "--adapter", at / "none"), (str(at / "none"), "no such adapter folder", "give"))


@case
def file_as_adapter(at: Place) -> Bad:
    file = adapter(at) / ADAPTER
    return Bad(at.convert(at.source, "--adapter", file), (str(file), "no such adapter folder", "give the folder"))


@case
def adapter_without_its_tensors(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER).unlink()
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), f"has no {ADAPTER}", "give the folder"))


@case
def adapter_without_its_config(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER_CONFIG).unlink()
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), f"has no {ADAPTER_CONFIG}", "give the folder"))


@case
def adapter_config_that_is_not_json(at: Place) -> Bad:
    folder = adapter(at)
    cut(folder / ADAPTER_CONFIG, 5)
    words = (str(folder / ADAPTER_CONFIG), "not valid JSON", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_config_that_is_a_list(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER_CONFIG).write_text("[]")
    words = (str(folder / ADAPTER_CONFIG), "must hold a JSON object", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_config_without_a_scale(at: Place) -> Bad:
    folder = adapter(at)
    edit_json(folder / ADAPTER_CONFIG, lambda config: config["lora_parameters"].pop("scale"))
    words = (str(folder / ADAPTER_CONFIG), "no finite number `scale`", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_of_an_unknown_kind(at: Place) -> Bad:
    folder = adapter(at)
    edit_json(folder / ADAPTER_CONFIG, lambda config: config.update(fine_tune_type="ia3"))
    words = (str(folder / ADAPTER_CONFIG), "'ia3'", "lora, dora, full", "mlx_lm.fuse")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_of_peft(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER).rename(folder / "adapter_model.safetensors")
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), "PEFT adapter", "merge it"))


@case
def adapter_cut_short(at: Place) -> Bad:
    folder = adapter(at)
    cut(folder / ADAPTER)
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder / ADAPTER), "cut short", "again"))


@case
def adapter_of_a_deeper_model(at: Place) -> Bad:
    stem = "model.layers.7.mlp.up_proj"
    pair = {f"{stem}.lora_a": mx.zeros((64, 4)), f"{stem}.lora_b": mx.zeros((4, 128))}
    folder = adapter(at, lambda tensors: tensors.update(pair))
    words = (str(folder / ADAPTER), stem, "does not have", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_of_a_wider_model(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.lora_a"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((96, 4))}))
    words = (str(folder / ADAPTER), name, "[96, 4]", "[64, 4]", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_with_half_a_pair(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.lora_b"
    folder = adapter(at, lambda tensors: tensors.pop(name))
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder / ADAPTER), f"lacks {name}", "again"))


@case
def adapter_with_a_tensor_of_another_kind(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((128, 64))}))
    words = (str(folder / ADAPTER), name, "none of lora_a, lora_b", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_with_nan(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.lora_b"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.full((4, 128), mx.nan)}))
    words = (str(folder / ADAPTER), name, "NaN", "train the adapter again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def full_adapter_of_another_model(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.bias"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((128,))}), kind="full")
    words = (str(folder / ADAPTER), f"replaces {name}", "does not have", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def full_adapter_of_a_wider_model(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((192, 64))}), kind="full")
    words = (str(folder / ADAPTER), name, "[192, 64]", "[128, 64]", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


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


@case
def full_disk_for_a_selection(at: Place) -> Bad:
    file = at / "s.safetensors"
    return Bad(at.select("--save-to", file), (str(file), "cannot be written", "free space"), prelude=full_disk(100))


@case
def selection_below_a_file(at: Place) -> Bad:
    (at / "out").write_text("a file")
    file = at / "out" / "s.safetensors"
    return Bad(at.select("--save-to", file), (str(file), "cannot be written", "write elsewhere"))


@case
def selection_with_another_suffix(at: Place) -> Bad:
    return Bad(at.select("--save-to", at / "s.json"), (str(at / "s.json"), "ends in .safetensors"))


# Selections.


def selection(at: Place, *widths: int) -> Path:
    file = at / "s.safetensors"
    ids = tuple(np.arange(8, dtype=np.int32) for _ in widths)
    Selection(ids, widths, "static").save(file)
    return file


@case
def selection_of_another_model(at: Place) -> Bad:
    file = selection(at, 128, 128, 128)
    return Bad(at.generate(at.sound, "--selection", file), (str(file), "made for another model", "ifprune select"))


@case
def comparison_with_another_model(at: Place) -> Bad:
    file = selection(at, 64, 64)
    return Bad(at.select("--compare", file), (str(file), "another model", "ifprune select"))


@case
def corrupt_selection(at: Place) -> Bad:
    file = selection(at, 128, 128)
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    return Bad(at.generate(at.sound, "--selection", file), (str(file), "again"))


@case
def selection_cut_short(at: Place) -> Bad:
    file = selection(at, 128, 128)
    cut(file, 3)
    return Bad(at.generate(at.sound, "--selection", file), (str(file), "cut short", "again"))


@case
def weights_as_selection(at: Place) -> Bad:
    file = at.sound / MODEL
    return Bad(at.generate(at.sound, "--selection", file), (str(file), "not a selection file", "ifprune select"))


@case
def missing_selection(at: Place) -> Bad:
    file = at / "none.safetensors"
    return Bad(at.generate(at.sound, "--selection", file), (str(file), "no such selection file", "ifprune select"))


# Named tasks.


def task(at: Place, name: str = "poetry") -> Path:
    """A task of the sound checkpoint in a data folder of the case's own, which `own_data` names."""
    ids = tuple(np.arange(8, dtype=np.int32) for _ in range(2))
    return TaskStore(Checkpoint.open(at.sound), at / "data").save(name, Selection(ids, (128, 128), "static"))


def own_data(at: Place) -> dict[str, str]:
    return {"IFPRUNE_DATA": str(at / "data")}


@case
def unknown_task(at: Place) -> Bad:
    task(at)
    words = ("no task poety", str(at.sound), "it has poetry", "--save poety")
    return Bad(at.generate(at.sound, "--task", "poety"), words, env=own_data(at))


@case
def task_that_another_checkpoint_has(at: Place) -> Bad:
    file = task(at)
    folder = at.checkpoint()
    edit_json(folder / "config.json", lambda config: config.update(comment="another"))
    write_manifest(folder, source="test", licence=None)
    words = ("no task poetry", str(folder), "has none", str(file), "--save poetry")
    return Bad(at.generate(folder, "--task", "poetry"), words, env=own_data(at))


@case
def task_of_another_shape(at: Place) -> Bad:
    file = task(at)
    ids = tuple(np.arange(8, dtype=np.int32) for _ in range(3))
    Selection(ids, (128, 128, 128), "static").save(file)
    words = (str(file), "3 FFNs", "made for another model", "make it again")
    return Bad(at.generate(at.sound, "--task", "poetry"), words, env=own_data(at))


@case
def corrupt_task(at: Place) -> Bad:
    file = task(at)
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    return Bad(at.generate(at.sound, "--task", "poetry"), ("task poetry", str(file), "again"), env=own_data(at))


@case
def task_cut_short(at: Place) -> Bad:
    file = task(at)
    cut(file, 3)
    words = ("task poetry", str(file), "cut short", "again")
    return Bad(at.generate(at.sound, "--task", "poetry"), words, env=own_data(at))


@case
def task_in_the_folder_above(at: Place) -> Bad:
    file = task(at)
    file.rename(file.parent.parent / file.name)
    words = ("'../poetry' cannot name a task", "use letters")
    return Bad(at.generate(at.sound, "--task", "../poetry"), words, env=own_data(at))


@case
def task_by_an_absolute_name(at: Place) -> Bad:
    file = task(at).with_suffix("")
    return Bad(at.generate(at.sound, "--task", file), ("cannot name a task", "use letters"), env=own_data(at))


@case
def task_in_a_folder_for_chat(at: Place) -> Bad:
    return Bad(["chat", "--model", at.sound, "--task", "a/b"], ("'a/b' cannot name a task", "use letters"))


@case
def task_name_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.select("--save", b"caf\xe9"), ("cannot name a task", "use letters"))


@case
def task_saved_outside(at: Place) -> Bad:
    words = ("'../../poetry' cannot name a task", "use letters")
    return Bad(at.select("--save", "../../poetry"), words, env=own_data(at))


@case
def task_with_a_hidden_name(at: Place) -> Bad:
    return Bad(
        at.select("--save", ".poetry"), ("'.poetry' cannot name a task", "beginning with a dot"), env=own_data(at)
    )


@case
def task_with_a_long_name(at: Place) -> Bad:
    return Bad(at.select("--save", "x" * 65), ("cannot name a task", "at most 64"), env=own_data(at))


@case
def removed_task_that_is_not_there(at: Place) -> Bad:
    arguments: list[Argument] = ["tasks", "--json", "--model", at.sound, "--remove", "poetry"]
    return Bad(arguments, ("no task poetry", "has none"), env=own_data(at))


@case
def removed_task_outside(at: Place) -> Bad:
    task(at)
    arguments: list[Argument] = ["tasks", "--json", "--model", at.sound, "--remove", "../x"]
    return Bad(arguments, ("'../x' cannot name a task", "use letters"), env=own_data(at))


@case
def data_folder_below_a_file(at: Place) -> Bad:
    (at / "data").write_text("a file")
    return Bad(at.select("--save", "poetry"), (str(at / "data"), "cannot be made", "IFPRUNE_DATA"), env=own_data(at))


@case
def data_folder_that_is_read_only(at: Place) -> Bad:
    where = "/proc/ifprune" if os.path.isdir("/proc") else "/dev/null"  # noqa: PTH112
    return Bad(at.select("--save", "poetry"), (where, "cannot be made", "IFPRUNE_DATA"), env={"IFPRUNE_DATA": where})


@case
def full_disk_for_a_task(at: Place) -> Bad:
    file = task(at)
    words = ("task poetry", str(file), "cannot be written", "free space")
    return Bad(at.select("--save", "poetry"), words, env=own_data(at), prelude=full_disk(100))


@case
def task_and_selection(at: Place) -> Bad:
    arguments = at.generate(at.sound, "--selection", at / "s.safetensors", "--task", "poetry")
    return Bad(arguments, ("--selection and --task", "give one of them"))


@case
def task_and_density(at: Place) -> Bad:
    arguments = at.generate(at.sound, "--task", "poetry", "--density", "0.5")
    return Bad(arguments, ("--task and --density", "give one of them"))


@case
def task_and_policy(at: Place) -> Bad:
    arguments: list[Argument] = ["chat", "--model", at.sound, "--task", "poetry", "--policy", "turn"]
    return Bad(arguments, ("--task and --policy", "give one of them"))


@case
def empty_prompt_to_compare_with(at: Place) -> Bad:
    return Bad(at.select("--with-prompt", " "), ("the prompt is empty", "write something"))


@case
def prompt_to_compare_with_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.select("--with-prompt", b"caf\xe9"), ("--with-prompt is not UTF-8", "--with-prompt -"))


@case
def prompt_to_compare_with_beyond_the_context(at: Place) -> Bad:
    words = ("the prompt has", "context holds 512", "shorten")
    return Bad(at.select("--with-prompt", "word " * 200, "--save", "poetry"), words, env=own_data(at))


# Exports.


def export(at: Place, *more: Argument) -> list[Argument]:
    return ["export", "--json", "--model", at.sound, "--mlx-path", at / "plain", *more]


def exported(at: Place, name: str = "plain") -> Path:
    """An earlier export."""
    ids = (np.arange(8, dtype=np.int32),) * 2
    export_selection(Checkpoint.open(at.sound), Selection(ids, (128, 128), "static"), at / name)
    return at / name


@case
def export_of_no_selection(at: Place) -> Bad:
    return Bad(export(at), ("nothing says which neurons", "give --selection FILE or --prompt TEXT"))


@case
def export_of_two_selections(at: Place) -> Bad:
    file = selection(at, 128, 128)
    return Bad(export(at, "--selection", file, "--prompt", "x"), ("--selection and --prompt", "give one of them"))


@case
def export_of_a_selection_at_a_density(at: Place) -> Bad:
    file = selection(at, 128, 128)
    return Bad(export(at, "--selection", file, "--density", "0.5"), ("--selection and --density", "give one of them"))


@case
def export_without_an_output(at: Place) -> Bad:
    arguments: list[Argument] = ["export", "--model", at.sound, "--prompt", "x"]
    return Bad(arguments, ("--mlx-path", "ifprune export --help"), code=2)


@case
def export_of_an_empty_prompt(at: Place) -> Bad:
    return Bad(export(at, "--prompt", " "), ("the prompt is empty", "write something"))


@case
def export_of_another_models_selection(at: Place) -> Bad:
    file = selection(at, 128, 64)
    return Bad(export(at, "--selection", file), (str(file), "made for another model", "ifprune select"))


@case
def export_of_a_damaged_selection(at: Place) -> Bad:
    file = selection(at, 128, 128)
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    return Bad(export(at, "--selection", file), (str(file), "again"))


@case
def export_of_junk(at: Place) -> Bad:
    file = at / "s.safetensors"
    file.write_bytes(np.random.default_rng(3).bytes(5000))
    return Bad(export(at, "--selection", file), (str(file), "not a safetensors file", "again"))


@case
def export_of_a_selection_that_differs_by_layer(at: Place) -> Bad:
    file = at / "s.safetensors"
    Selection((np.arange(8, dtype=np.int32), np.arange(16, dtype=np.int32)), (128, 128), "mine").save(file)
    words = (str(at.sound), "keeps 8, 16 neurons", "mlx-lm's llama", "the same number in every FFN")
    return Bad(export(at, "--selection", file), words)


@case
def export_of_a_damaged_checkpoint(at: Place) -> Bad:
    folder, file = at.checkpoint(), selection(at, 128, 128)
    edit_tensors(folder / MODEL, lambda arrays: arrays.pop("model.norm.weight"))
    words = (str(folder), "model.norm.weight", "convert the source again")
    return Bad(export(at, "--model", folder, "--selection", file), words)


@case
def export_of_a_checkpoint_whose_config_names_no_model(at: Place) -> Bad:
    folder, file = at.checkpoint(), selection(at, 128, 128)
    edit_json(folder / "config.json", lambda config: config.update(model_type="\x00junk"))
    write_manifest(folder, source="test", licence=None)
    return Bad(export(at, "--model", folder, "--selection", file), (str(folder), "no model_type"))


@case
def export_of_a_plain_model(at: Place) -> Bad:
    file = selection(at, 128, 128)
    words = ("config.json", "no ifpruning section", "ifprune convert")
    return Bad(export(at, "--model", exported(at, "earlier"), "--selection", file), words)


@case
def requantized_export_of_floats(at: Place) -> Bad:
    file = selection(at, 128, 128)
    words = (str(at.sound), "not quantized", "leave out --requantize-down")
    return Bad(export(at, "--selection", file, "--requantize-down"), words)


@case
def export_that_exists(at: Place) -> Bad:
    file, out = selection(at, 128, 128), exported(at)
    return Bad(export(at, "--selection", file), (str(out), "already exists", "--overwrite"))


@case
def export_over_a_checkpoint(at: Place) -> Bad:
    folder, file = at.checkpoint(), selection(at, 128, 128)
    arguments = export(at, "--model", folder, "--selection", file, "--mlx-path", folder, "--overwrite")
    return Bad(arguments, (str(folder), "was not written by `ifprune export`", "choose another folder"))


@case
def export_over_a_dense_model(at: Place) -> Bad:
    folder, file = at.dense(), selection(at, 128, 128)
    arguments = export(at, "--selection", file, "--mlx-path", folder, "--overwrite")
    return Bad(arguments, (str(folder), "was not written by `ifprune export`", "choose another folder"))


@case
def export_below_a_file(at: Place) -> Bad:
    file = selection(at, 128, 128)
    arguments = export(at, "--selection", file, "--mlx-path", file / "model")
    return Bad(arguments, (str(file / "model"), "cannot be written", "write elsewhere"))


@case
def export_where_nothing_can_be_made(at: Place) -> Bad:
    where = "/proc/ifprune/model" if os.path.isdir("/proc") else "/dev/null/model"  # noqa: PTH112
    arguments = export(at, "--selection", selection(at, 128, 128), "--mlx-path", where)
    return Bad(arguments, (where, "cannot be written", "write elsewhere"))


@case
def full_disk_for_an_export(at: Place) -> Bad:
    file = selection(at, 128, 128)
    words = (str(at / "plain"), "cannot be written", "free space")
    return Bad(export(at, "--selection", file), words, prelude=full_disk(50_000))


@case
def full_disk_for_an_export_over_another(at: Place) -> Bad:
    file, out = selection(at, 128, 128), exported(at)
    words = (str(out), "cannot be written", "nothing was changed")
    return Bad(export(at, "--selection", file, "--overwrite"), words, prelude=full_disk(50_000))


# Saved chats.


def chat(at: Place, text: str) -> list[Argument]:
    (at / "chat.json").write_text(text)
    return ["chat", "--model", at.sound, "--load", at / "chat.json"]


@case
def corrupt_saved_chat(at: Place) -> Bad:
    return Bad(chat(at, '{"format": 1, "messages": [{"ro'), (str(at / "chat.json"), "not a saved chat", "give a file"))


@case
def saved_chat_of_another_kind(at: Place) -> Bad:
    return Bad(chat(at, '{"messages": []}'), (str(at / "chat.json"), "not a saved chat", "give a file"))


# The test.


@dataclass(frozen=True)
class Outcome:
    """What a case's process did, and its folder before and after."""

    bad: Bad
    done: subprocess.CompletedProcess[str]
    before: dict[str, str]
    after: dict[str, str]


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, hidden ones too, with a hash of what is in it."""
    return {
        str(entry.relative_to(folder)): sha256(entry.read_bytes()).hexdigest() if entry.is_file() else "folder"
        for entry in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    """The selected cases' processes, as many at a time as there are cores."""
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    names = [str(item.callspec.params["name"]) for item in items if hasattr(item, "callspec")]
    shared = tmp_path_factory.mktemp("shared")
    write_checkpoint(shared / "checkpoint")

    def execute(bad: Bad, folder: Path, before: dict[str, str]) -> Outcome:
        arguments = bad.arguments
        done = run(*arguments, cache=shared / "cache", stdin=bad.stdin, env=bad.env, prelude=bad.prelude)
        return Outcome(bad, done, before, contents(folder))

    started: dict[str, Future[Outcome]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in names:
            place = Place(tmp_path_factory.mktemp(name), shared)
            bad = CASES[name](place)
            started[name] = pool.submit(execute, bad, place.folder, contents(place.folder))
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes[name].result()
    done = outcome.done
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    assert done.returncode == outcome.bad.code
    for word in outcome.bad.words:
        assert word in errors[0]
    assert done.stdout == ""
    assert outcome.after == outcome.before
