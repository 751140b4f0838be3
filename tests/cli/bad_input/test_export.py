"""Bad input to `ifprune export`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ifprune_convert.export import export_selection
from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, Selection
from ifprune_mlx.checkpoint.format_writer import write_manifest
from tests.cli.bad_input.table import MODEL, Bad, Check, Place, Table, edit_json, edit_tensors, selection
from tests.cli.process import Argument, full_disk

TABLE = Table()
case = TABLE.case


def export(at: Place, *more: Argument) -> list[Argument]:
    return ["export", "--json", "--model", at.sound, "--mlx-path", at / "plain", *more]


def exported(at: Place, name: str = "plain") -> Path:
    """An earlier export."""
    ids = (np.arange(8, dtype=np.int32),) * 2
    export_selection(Checkpoint.open(at.sound), Selection(ids, (128, 128), "static"), at / name)
    return at / name


@case
def export_of_no_selection(at: Place) -> Bad:
    return Bad(export(at), ("nothing says which neurons", "give --selection FILE, --task NAME or --prompt TEXT"))


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


@case
def export_over_somebody_elses_folder(at: Place) -> Bad:
    (at / "plain").mkdir()
    (at / "plain" / "thesis.txt").write_text("years of work")
    arguments = export(at, "--selection", selection(at, 128, 128), "--overwrite")
    return Bad(arguments, (str(at / "plain"), "was not written by `ifprune export`", "choose another folder"))


@case
def export_over_a_file(at: Place) -> Bad:
    (at / "plain").write_text("years of work")
    arguments = export(at, "--selection", selection(at, 128, 128), "--overwrite")
    return Bad(arguments, (str(at / "plain"), "was not written by `ifprune export`", "choose another folder"))


@case
def requantized_export_whose_neurons_do_not_fill_a_group(at: Place) -> Bad:
    packed, file = at / "packed", selection(at, 128, 128)
    convert(open_source(at.source), packed, Options(quantization=quantization_of("affine", None, None)))
    arguments = export(at, "--model", packed, "--selection", file, "--requantize-down")
    return Bad(arguments, ("8 neurons", "groups of 64", "--requantize-down"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
