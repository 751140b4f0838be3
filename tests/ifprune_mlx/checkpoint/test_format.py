"""A checkpoint opens only if it is whole; what it says about its size is what the stock model has."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Checkpoint, CheckpointError, load
from ifprune_mlx.checkpoint.atomic_write import sha256_file
from ifprune_mlx.checkpoint.format import Quantization
from tests.ifprune_mlx.reference import source_model
from tests.tiny import CONFIGS, write_checkpoint

NEURONS = "neurons-00002-of-00002.safetensors"
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a JSON file in place, and the manifest with it: the damage is in what the file says, not in its size."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        result = change(value)
        (folder / name).write_text(json.dumps(value if result is None else result))
        if name != "manifest.json":
            restate(folder, name)

    return spoil


def section(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: (change(config["ifpruning"]), None)[1])


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return edit_json("manifest.json", lambda value: (change(value), None)[1])


def restate(folder: Path, name: str) -> None:
    """Bring the manifest's entry for a file up to date."""
    value = json.loads((folder / "manifest.json").read_text())
    value["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(value))


def edit_tensors(name: str, change: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = mx.load(str(folder / name))
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(folder / name), tensors, {"format": "mlx"})
        restate(folder, name)

    return spoil


def cut(name: str, *, admitted: bool) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        if admitted:
            restate(folder, name)

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def only_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def set_ffn(key: str, value: Any) -> Callable[[Path], None]:
    return section(lambda s: s["ffns"][1].update({key: value}))


# What is done to the folder, the file that the message must name, and what it must say.
DEFECTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no folder": (shutil.rmtree, "", "no such folder"),
    "a file": (only_file, "", "is a file"),
    "no config": (remove("config.json"), "", "has no config.json"),
    "config no JSON": (write("config.json", b"{"), "config.json", "not valid JSON"),
    "config not UTF-8": (write("config.json", b"\xff\xfe"), "config.json", "not valid JSON"),
    "config a list": (write("config.json", b"[]"), "config.json", "must hold a JSON object"),
    "config too deep": (write("config.json", b"[" * 100_000), "config.json", "not valid JSON"),
    "no section": (edit_json("config.json", lambda c: {"model_type": "llama"}), "config.json", "no ifpruning section"),
    "section a list": (edit_json("config.json", lambda c: c | {"ifpruning": []}), "config.json", "no ifpruning"),
    "a newer format": (section(lambda s: s.update(format_version=2)), "config.json", "version 2, this release reads 1"),
    "no format": (section(lambda s: s.pop("format_version")), "config.json", "version None"),
    "unknown key": (section(lambda s: s.update(gains=[1])), "config.json", "unknown key 'gains'"),
    "missing key": (section(lambda s: s.pop("density")), "config.json", "key 'density' is missing"),
    "unknown FFN key": (set_ffn("gain", 1), "config.json", "unknown key 'gain'"),
    "missing FFN key": (section(lambda s: s["ffns"][0].pop("bias")), "config.json", "key 'bias' is missing"),
    "no FFNs": (section(lambda s: s.update(ffns=[])), "config.json", "no usable FFN"),
    "FFNs a number": (section(lambda s: s.update(ffns=3)), "config.json", "malformed"),
    "an FFN a number": (section(lambda s: s.update(ffns=[3])), "config.json", "malformed"),
    "width of text": (set_ffn("d_ffn", "wide"), "config.json", "malformed"),
    "width 0": (set_ffn("d_ffn", 0), "config.json", "no usable FFN"),
    "density 0": (section(lambda s: s.update(density=0)), "config.json", "density"),
    "density 2": (section(lambda s: s.update(density=2)), "config.json", "density"),
    "density NaN": (section(lambda s: s.update(density=float("nan"))), "config.json", "density"),
    "density of text": (section(lambda s: s.update(density="half")), "config.json", "malformed"),
    "density null": (section(lambda s: s.update(density=None)), "config.json", "malformed"),
    "unknown selector": (section(lambda s: s.update(selector="best")), "config.json", "default selector 'best'"),
    "quantization a text": (section(lambda s: s.update(quantization="q4")), "config.json", "unknown key"),
    "quantization a half": (
        section(lambda s: s.update(quantization={"gate_up": {"group_size": 64, "bits": 4, "mode": "affine"}})),
        "config.json",
        "key 'down' is missing",
    ),
    "quantization incomplete": (
        section(lambda s: s.update(quantization={"gate_up": {"bits": 4}, "down": {"bits": 4}})),
        "config.json",
        "malformed",
    ),
    "groups of 0": (
        section(lambda s: s.update(quantization=dict.fromkeys(("gate_up", "down"), packing(0, 4)))),
        "config.json",
        "malformed",
    ),
    "bits of text": (
        section(lambda s: s.update(quantization=dict.fromkeys(("gate_up", "down"), packing(64, "four")))),
        "config.json",
        "malformed",
    ),
    "unknown packing": (
        section(lambda s: s.update(quantization=dict.fromkeys(("gate_up", "down"), packing(64, 4, "secret")))),
        "config.json",
        "malformed",
    ),
    "float rows said to be packed": (
        section(lambda s: s.update(quantization=dict.fromkeys(("gate_up", "down"), packing(64, 4)))),
        "neurons-00001-of-00002.safetensors",
        "gate_up.weight has shape",
    ),
    "no manifest": (remove("manifest.json"), "", "has no manifest.json"),
    "manifest no JSON": (write("manifest.json", b"{'files'"), "manifest.json", "not valid JSON"),
    "manifest empty": (write("manifest.json", b"{}"), "manifest.json", "lists no files"),
    "manifest without files": (manifest(lambda m: m.update(files={})), "manifest.json", "lists no files"),
    "files a list": (manifest(lambda m: m.update(files=["config.json"])), "manifest.json", "lists no files"),
    "entry a number": (manifest(lambda m: m["files"].update({NEURONS: 3})), "manifest.json", "malformed"),
    "size of text": (manifest(lambda m: m["files"][NEURONS].update(size="big")), "manifest.json", "malformed"),
    "no sha256": (manifest(lambda m: m["files"][NEURONS].pop("sha256")), "manifest.json", "malformed"),
    "a path upwards": (
        manifest(lambda m: m["files"].update({"../x.json": {"size": 1, "sha256": ""}})),
        "manifest.json",
        "leaves the checkpoint",
    ),
    "a path upwards in the middle": (
        manifest(lambda m: m["files"].update({"a/../../x.json": {"size": 1, "sha256": ""}})),
        "manifest.json",
        "leaves the checkpoint",
    ),
    "an absolute path": (
        manifest(lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}})),
        "manifest.json",
        "leaves the checkpoint",
    ),
    "wrong size": (manifest(lambda m: m["files"][NEURONS].update(size=5)), NEURONS, "manifest.json says 5"),
    "neurons missing": (remove(NEURONS), NEURONS, "missing, though manifest.json lists it"),
    "neurons cut": (cut(NEURONS, admitted=False), NEURONS, "manifest.json says"),
    "neurons cut, manifest too": (cut(NEURONS, admitted=True), NEURONS, "cut short"),
    "weights cut, manifest too": (cut(WEIGHTS, admitted=True), WEIGHTS, "cut short"),
    "neurons not listed": (manifest(lambda m: m["files"].pop(NEURONS)), NEURONS, "not listed in manifest.json"),
    "priors not listed": (
        manifest(lambda m: m["files"].pop("priors.safetensors")), "priors.safetensors", "not listed in manifest.json"
    ),
    "weights not listed": (manifest(lambda m: m["files"].pop(WEIGHTS)), "", r"no model-\*.safetensors"),
    "down missing": (edit_tensors(NEURONS, lambda t: t.pop("down.weight")), NEURONS, "down.weight is missing"),
    "gate and up missing": (edit_tensors(NEURONS, lambda t: t.pop("gate_up.weight")), NEURONS, "gate_up.weight is mis"),
    "down not transposed": (
        edit_tensors(NEURONS, lambda t: t.update({"down.weight": t["down.weight"].T})),
        NEURONS,
        r"down.weight has shape \[64, 128\], config.json asks for \[128, 64\]",
    ),
    "gate alone": (
        edit_tensors(NEURONS, lambda t: t.update({"gate_up.weight": t["gate_up.weight"][:, 0]})),
        NEURONS,
        r"gate_up.weight has shape \[128, 64\], config.json asks for \[128, 2, 64\]",
    ),
    "another width": (set_ffn("d_ffn", 136), NEURONS, r"asks for \[136, 2, 64\]"),
    "a bias that is not there": (set_ffn("bias", True), NEURONS, "gate_up.bias is missing"),
    "a down bias that is not there": (set_ffn("down_bias", True), NEURONS, "down.bias is missing"),
    "a prior missing": (
        edit_tensors("priors.safetensors", lambda t: t.pop("prior.1")), "priors.safetensors", "prior.1 is missing"
    ),
    "a prior too short": (
        edit_tensors("priors.safetensors", lambda t: t.update({"down_norm.0": t["down_norm.0"][:7]})),
        "priors.safetensors",
        r"down_norm.0 has shape \[7\]",
    ),
    "priors no safetensors": (
        lambda folder: (write("priors.safetensors", b"PK\x03\x04")(folder), restate(folder, "priors.safetensors")),
        "priors.safetensors",
        "not a safetensors file",
    ),
}  # fmt: skip


def packing(group_size: Any, bits: Any, mode: str = "affine") -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": mode}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_at_opening_with_one_line_that_names_the_file(folder: Path, defect: str) -> None:
    spoil, name, reason = DEFECTS[defect]
    spoil(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / name if name else folder))
    assert "\n" not in message
    assert ";" in message or "missing" in message  # what to do comes after what is wrong


# Sound to the checks at opening, but files that mlx-lm cannot make a model of.
MISMATCHES: dict[str, Callable[[Path], Any]] = {
    "a weight missing": edit_tensors(WEIGHTS, lambda t: t.pop("model.norm.weight")),
    "an unknown weight": edit_tensors(WEIGHTS, lambda t: t.update({"model.extra.weight": mx.ones(3)})),
    "a weight of another shape": edit_tensors(WEIGHTS, lambda t: t.update({"model.norm.weight": mx.ones(63)})),
    "no such family": edit_json("config.json", lambda c: c.update(model_type="nonesuch")),
    "no family": edit_json("config.json", lambda c: c.pop("model_type") and None),
    "more layers": edit_json("config.json", lambda c: c.update(num_hidden_layers=3)),
    "another path": set_ffn("path", "model.layers.7.mlp"),
    "a path that is no text": set_ffn("path", 7),
    "a leaf that is not there": set_ffn("gate", "w1"),
    "no tokenizer": lambda folder: (remove("tokenizer.json")(folder), manifest(drop_tokenizer)(folder)),
    "tokenizer no JSON": lambda folder: (write("tokenizer.json", b"{")(folder), restate(folder, "tokenizer.json")),
}


def drop_tokenizer(value: dict[str, Any]) -> None:
    del value["files"]["tokenizer.json"]


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_files_that_do_not_belong_together_are_refused_with_one_line(folder: Path, mismatch: str) -> None:
    MISMATCHES[mismatch](folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_verify_finds_a_flipped_byte(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.verify(lambda done, total: seen.append((done, total))) == []
    assert seen == [(i, len(checkpoint.manifest["files"])) for i in range(1, len(checkpoint.manifest["files"]) + 1)]
    content = bytearray((folder / NEURONS).read_bytes())
    content[-1] ^= 1
    (folder / NEURONS).write_bytes(content)
    assert Checkpoint.open(folder).verify() == [NEURONS]  # opening reads no weights, and so cannot know


def test_files_beside_the_checkpoint_are_let_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" not in Checkpoint.open(folder).manifest["files"]


def test_equal_files_have_equal_ids(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    ours = Checkpoint.open(tiny_checkpoint).id
    assert Checkpoint.open(folder).id == ours
    manifest(lambda m: m.update(created="another day"))(folder)
    assert Checkpoint.open(folder).id == ours
    assert Checkpoint.open(write_checkpoint(tmp_path / "checkpoint-again")).id == ours
    assert Checkpoint.open(write_checkpoint(tmp_path / "other", rope_theta=500.0)).id != ours


def test_a_user_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert Checkpoint.open(f"~/{folder.name}").path == folder


# Sizes.


def count(model: Any) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("packed", [None, ("affine", 64, 4), ("affine", 32, 3), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_those_of_the_stock_model(
    tmp_path: Path, family: str, packed: tuple[str, int, int] | None
) -> None:
    options = Options(quantization=quantization_of(*packed) if packed else None)
    folder = write_checkpoint(tmp_path / "checkpoint", family, options)
    checkpoint, stock = Checkpoint.open(folder), source_model(folder)

    assert checkpoint.parameters == count(stock)
    assert checkpoint.ffn_parameters == sum(count(layer.mlp) for layer in stock.model.layers)
    assert checkpoint.active_parameters(None) == checkpoint.active_parameters((128, 128)) == checkpoint.parameters
    for layer, k in zip(stock.model.layers, (24, 96), strict=True):
        for leaf in ("gate_proj", "up_proj"):
            layer.mlp[leaf].weight = layer.mlp[leaf].weight[:k]
            if "bias" in layer.mlp[leaf]:
                layer.mlp[leaf].bias = layer.mlp[leaf].bias[:k]
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight[:, :k]
    assert checkpoint.active_parameters((24, 96)) == count(stock)


@pytest.mark.parametrize("packed", [None, ("affine", 64, 4), ("mxfp4", 32, 4)])
@pytest.mark.parametrize("family", ["llama-bias", "llama-untied"])
def test_weight_bytes_are_what_a_loaded_model_holds(
    tmp_path: Path, family: str, packed: tuple[str, int, int] | None
) -> None:
    options = Options(quantization=quantization_of(*packed) if packed else None)
    folder = write_checkpoint(tmp_path / "checkpoint", family, options)
    model, _ = load(folder)
    held = sum(array.nbytes for _, array in tree_flatten(model.module.parameters()))
    for slots in model.slots:
        held += sum(rows.nbytes for rows in slots.rows.values())
        held += 0 if slots.down_bias is None else slots.down_bias.nbytes
    assert model.checkpoint.weight_bytes == held
    if packed is None:
        assert held == 4 * count(source_model(folder))


def test_quantization_knows_which_modes_have_biases() -> None:
    assert [Quantization(32, 4, mode).has_biases for mode in ("affine", "mxfp4", "nvfp4", "mxfp8")] == [True] + [
        False
    ] * 3
    assert Quantization(32, 4, "mxfp4").to_dict() == {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def test_the_manifest_states_every_file(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    names = {str(file.relative_to(tiny_checkpoint)) for file in tiny_checkpoint.rglob("*") if file.is_file()}
    assert set(checkpoint.manifest["files"]) == names - {"manifest.json", "README.md"}
    assert checkpoint.prior_method == "weights"
    assert not checkpoint.has_predictor
    rows = checkpoint.headers[NEURONS].tensors
    assert {name: info.shape for name, info in rows.items()} == {
        "gate_up.weight": (128, 2, 64),
        "down.weight": (128, 64),
    }
    assert math.prod(rows["down.weight"].shape) * 4 == rows["down.weight"].end - rows["down.weight"].start


def test_a_config_that_wants_to_run_its_own_code_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    with pytest.raises(CheckpointError, match="wants to run code"):
        Checkpoint.open(copy)
    assert not ran.exists()
