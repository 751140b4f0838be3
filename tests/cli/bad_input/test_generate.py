"""Bad input to `ifprune generate`."""

from __future__ import annotations

import numpy as np
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Selection
from ifprune_mlx.checkpoint.format_writer import write_manifest
from tests.cli.bad_input.table import (
    MODEL,
    NEURONS,
    Bad,
    Check,
    Place,
    Table,
    cut,
    edit_json,
    edit_tensors,
    own_data,
    selection,
    task,
)
from tests.tiny_predictor import write_predictor

TABLE = Table()
case = TABLE.case


# A damaged checkpoint.


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
def damaged_tokenizer(at: Place) -> Bad:
    folder = at.checkpoint()
    cut(folder / "tokenizer.json")
    write_manifest(folder, source="test", licence=None)
    return Bad(at.generate(folder), (str(folder), "the tokenizer cannot be loaded", "convert the source again"))


@case
def plain_model_folder(at: Place) -> Bad:
    return Bad(at.generate(at.source, "--no-convert"), ("config.json", "no ifpruning section", "ifprune convert"))


@case
def missing_model_folder(at: Place) -> Bad:
    return Bad(at.generate(at / "nowhere"), (str(at / "nowhere"), "no such folder", "give a model: its folder"))


@case
def file_as_model(at: Place) -> Bad:
    file = at.sound / "config.json"
    return Bad(at.generate(file), (str(file), "is a file", "give a model: its folder"))


@case
def hub_id_while_offline(at: Place) -> Bad:
    words = ("someone/some-model", "no such folder here", "HF_HUB_OFFLINE is set; unset it")
    return Bad(at.generate("someone/some-model"), words)


# Predictors.


@case
def predictor_with_nan_in_its_head(at: Place) -> Bad:
    write_predictor(at / "predictor", poison=True)
    convert(open_source(at.source), at / "checkpoint", Options(predictor=at / "predictor"))
    where = str(at / "checkpoint" / "predictor")
    return Bad(at.generate(at / "checkpoint"), (where, "scores contain NaN", "convert"))


@case
def learned_selector_without_a_predictor(at: Place) -> Bad:
    words = (str(at.sound), "no trained predictor", "--selector activation")
    return Bad(at.generate(at.sound, "--selector", "learned"), words)


# Budgets and options.


@case
def density_0(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--density", "0"), ("density 0", "above 0 and at most 1"))


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
    return Bad(at.generate(at.sound, "--memory", "1KB"), ("memory budget", "is too small", "give at least"))


@case
def too_little_memory_for_every_neuron(at: Place) -> Bad:
    arguments = at.generate(at.sound, "--memory", "100KB", "--residency", "ram")
    return Bad(arguments, ("memory budget", "raise the budget", "--residency ssd"))


@case
def dense_without_memory_for_it(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--residency", "ssd", "--dense"), ("a dense model", "residency ram"))


@case
def a_residency_that_there_is_not(at: Place) -> Bad:
    return Bad(at.generate(at.sound, "--residency", "tape"), ("--residency", "tape", "ram"), code=2)


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
def stdin_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.generate(at.sound, prompt="-"), ("stdin, byte 3", "not UTF-8", "iconv"), stdin=b"caf\xe9 au lait")


@case
def argument_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.generate(at.sound, prompt=b"caf\xe9"), ("--prompt is not UTF-8", "--prompt -"))


# Selections.


@case
def selection_of_another_model(at: Place) -> Bad:
    file = selection(at, 128, 128, 128)
    return Bad(at.generate(at.sound, "--selection", file), (str(file), "made for another model", "ifprune select"))


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
def task_and_selection(at: Place) -> Bad:
    arguments = at.generate(at.sound, "--selection", at / "s.safetensors", "--task", "poetry")
    return Bad(arguments, ("--selection and --task", "give one of them"))


@case
def task_and_density(at: Place) -> Bad:
    arguments = at.generate(at.sound, "--task", "poetry", "--density", "0.5")
    return Bad(arguments, ("--task and --density", "give one of them"))


@case
def task_without_a_name(at: Place) -> Bad:
    task(at)
    return Bad(at.generate(at.sound, "--task", ""), ("'' cannot name a task", "use letters"), env=own_data(at))


@case
def task_by_a_name_with_a_line_break(at: Place) -> Bad:
    task(at)
    words = (r"'poetry\n' cannot name a task", "use letters")
    return Bad(at.generate(at.sound, "--task", "poetry\n"), words, env=own_data(at))


@case
def task_that_is_a_folder(at: Place) -> Bad:
    file = task(at)
    file.unlink()
    file.mkdir()
    return Bad(at.generate(at.sound, "--task", "poetry"), ("no task poetry", "--save poetry"), env=own_data(at))


@case
def task_of_junk(at: Place) -> Bad:
    file = task(at)
    file.write_bytes(b"\x93" * 5000)
    words = ("task poetry", str(file), "not a safetensors file", "again")
    return Bad(at.generate(at.sound, "--task", "poetry"), words, env=own_data(at))


# Models that are no IFP checkpoints, and models of the hub.


@case
def gguf_as_model(at: Place) -> Bad:
    file = at.gguf()
    return Bad(at.generate(file, "--no-convert"), (str(file), "is a GGUF file", "ifprune convert --model"))


@case
def folder_of_pickles_as_model(at: Place) -> Bad:
    folder = at.dense()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return Bad(at.generate(folder), (str(folder), "are Python pickles", "use the model's safetensors or GGUF version"))


@case
def model_that_the_hub_lacks(at: Place) -> Bad:
    words = ("org/no-such-model", "no such repository on the hub", "check the name")
    return Bad(at.generate("org/no-such-model"), words, env=at.online)


@case
def dense_model_of_the_hub(at: Place) -> Bad:
    name = at.upload(at.source)
    words = (name, "no IFP checkpoint", f"ifprune convert --model {name}")
    return Bad(at.generate(name, "--no-convert"), words, env=at.online)


@case
def checkpoint_that_is_larger_than_the_disk(at: Place) -> Bad:
    name = at.upload(at.sound)
    at.hub.sizes[name, "manifest.json"] = 10**18
    return Bad(at.generate(name), (name, "1000000.0 TB to download", "free some space"), env=at.online)


@case
def checkpoint_of_the_hub_that_is_larger_than_memory(at: Place) -> Bad:
    name = at.upload(at.sound)
    at.hub.sizes[name, NEURONS] = 10**18
    words = (name, "would stay in memory", "nothing was downloaded", "--residency ssd")
    return Bad(at.generate(name), words, env=at.online)


@case
def checkpoint_that_comes_damaged(at: Place) -> Bad:
    name = at.upload(at.sound)
    at.hub.repositories[name][NEURONS] = bytes(reversed(at.hub.repositories[name][NEURONS]))
    return Bad(at.generate(name), (NEURONS, "again"), env=at.online)


@case
def hub_id_with_a_revision(at: Place) -> Bad:
    return Bad(at.generate("org/model@v1"), ("org/model@v1", "no such folder"), env=at.online)


@case
def checkpoint_of_the_hub_that_names_files_elsewhere(at: Place) -> Bad:
    name = at.upload(at.sound)
    at.hub.repositories[name]["../../../stray.json"] = b"{}"
    return Bad(at.generate(name), (name, "stray.json"), env=at.online)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
