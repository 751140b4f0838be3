"""Bad input to `ifprune info`."""

from __future__ import annotations

import pytest

from tests.cli.bad_input.table import NEURONS, Bad, Check, Place, Table, edit_json, edit_tensors

TABLE = Table()
case = TABLE.case


@case
def manifest_with_a_wrong_size(at: Place) -> Bad:
    folder = at.checkpoint()
    edit_json(folder / "manifest.json", lambda manifest: manifest["files"]["tokenizer.json"].update(size=7))
    return Bad(["info", "--model", folder], ("tokenizer.json", "manifest.json says 7", "again"))


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
def flipped_byte_found_by_verify(at: Place) -> Bad:
    folder = at.checkpoint()
    content = bytearray((folder / NEURONS).read_bytes())
    content[-5] ^= 1
    (folder / NEURONS).write_bytes(content)
    return Bad(["info", "--verify", "--model", folder], (str(folder), NEURONS, "sha256", "again"))


@case
def manifest_that_names_files_elsewhere(at: Place) -> Bad:
    folder = at.checkpoint()
    (at / "stray.json").write_text("{}")
    stray = {"../stray.json": {"size": 2, "sha256": "0" * 64}}
    edit_json(folder / "manifest.json", lambda manifest: manifest["files"].update(stray))
    return Bad(
        ["info", "--model", folder], ("manifest.json", "../stray.json", "leaves the checkpoint", "do not use it")
    )


@case
def gated_checkpoint(at: Place) -> Bad:
    name = at.upload(at.sound)
    at.hub.gated.add(name)
    return Bad(["info", "--model", name], (name, "grant access", "hf auth login"), env=at.online)


@case
def gguf_to_look_at(at: Place) -> Bad:
    file = at.gguf()
    return Bad(["info", "--model", file], (str(file), "is a GGUF file, no IFP checkpoint", "ifprune convert"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
