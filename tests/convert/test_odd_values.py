"""Values of the wrong kind in configs, manifests and headers, and special files, end in one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.export import export_selection
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.predictor import open_predictor
from ifprune_convert.readers import open_source
from ifprune_convert.skeleton import build_skeleton
from ifprune_mlx import Checkpoint, IfpruneError, load
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.selection.predictor import SparsityPredictor
from tests.cli.process import run_here
from tests.family_configs import tiny_config
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_source
from tests.tiny_predictor import write_predictor


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(IfpruneError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


CONFIGS: list[dict[str, Any]] = [
    {"rope_theta": "x"},
    {"rope_theta": True},
    {"rope_theta": float("nan")},
    {"rms_norm_eps": "1e-5"},
    {"rms_norm_eps": -1.0},
    {"architectures": 5},
    {"architectures": [["LlamaForCausalLM"]]},
    {"architectures": {"a": 1}},
    {"model_type": 5},
    {"model_type": ["llama"]},
    {"tie_word_embeddings": "false"},
    {"attention_bias": "no"},
    {"mlp_bias": []},
    {"hidden_size": [64]},
    {"num_hidden_layers": "2"},
    {"num_key_value_heads": {"a": 2}},
    {"vocab_size": "320"},
    {"intermediate_size": 2**63},
    {"hidden_size": 2**63},
    {"vocab_size": -1},
    {"head_dim": "x"},
    {"rope_scaling": "x"},
    {"rope_scaling": {"type": "linear", "factor": "x"}},
    {"rope_scaling": {"type": 5, "factor": 2.0}},
    {"rope_traditional": "x"},
    {"eos_token_id": "</s>"},
    {"eos_token_id": [None]},
    {"bos_token_id": {"a": 1}},
    {"quantization": 5},
    {"quantization": {"group_size": "x", "bits": 4}},
]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("hunyuan", {"moe_topk": [2] * 4, "num_shared_expert": [1] * 4}), ("step3p5", {"rope_theta": [1e4] * 4})],
)
def test_values_for_each_layer_are_fine_where_the_class_reads_them(family: str, changes: dict[str, Any]) -> None:
    """As in the published Hunyuan-Large and Step 3.5."""
    scaling = {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}} if family == "hunyuan" else {}
    config = (tiny_config(family) or {}) | scaling | changes
    build_skeleton(Path("model"), config, 100)
    key = next(iter(changes))
    assert f"{key} is 'x'" in refusal(lambda: build_skeleton(Path("model"), config | {key: ["x"] * 4}, 100))


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_config_of_a_source(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = write_source(tmp_path / "source")
    edit(source / "config.json", lambda config: config.update(changes))

    def run() -> None:
        convert(open_source(source), tmp_path / "out", Options())

    if "quantization" in changes:
        run()  # nothing is packed, so it says nothing
    else:
        assert str(source) in refusal(run)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_config_of_a_checkpoint(tmp_path: Path, tiny_checkpoint: Path, changes: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    edit(folder / "config.json", lambda config: config.update(changes))
    write_manifest(folder, source="test", licence=None)
    if isinstance(changes.get("quantization"), dict):
        load(folder)
    else:
        assert str(folder) in refusal(lambda: load(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(licence=5),
        lambda manifest: manifest.update(source=["a"]),
        lambda manifest: manifest.update(versions=[]),
        lambda manifest: manifest.update(versions={"mlx": 1}),
        lambda manifest: manifest.update(files=[1]),
        lambda manifest: manifest["files"].update({"config.json": 5}),
        lambda manifest: manifest["files"]["config.json"].update(sha256=5),
        lambda manifest: manifest["files"]["config.json"].update(size="x"),
        lambda manifest: manifest["files"].update({"\x00": {"size": 1, "sha256": ""}}),
        lambda manifest: manifest["files"].update({"\ud800": {"size": 1, "sha256": ""}}),
    ],
)
def test_a_manifest(tmp_path: Path, tiny_checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    edit(folder / "manifest.json", change)
    refusal(lambda: Checkpoint.open(folder))


@pytest.mark.parametrize("key", ["source", "licence", "versions", "created", "model_type"])
def test_info_and_export_without_a_key(tmp_path: Path, tiny_checkpoint: Path, key: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    if key == "model_type":
        edit(folder / "config.json", lambda config: config.pop(key))
        write_manifest(folder, source="test", licence=None)
        assert "names no model_type" in refusal(lambda: Checkpoint.open(folder))
        done = run_here("info", "--model", folder)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        return
    edit(folder / "manifest.json", lambda manifest: manifest.pop(key))
    checkpoint = Checkpoint.open(folder)
    export_selection(checkpoint, random_selection(checkpoint.widths, [64, 64], 1), tmp_path / "out")
    assert run_here("info", "--model", folder).returncode == 0


FFN = ("path", "gate", "up", "down", "d_model", "d_ffn", "bias", "down_bias")


@pytest.mark.parametrize("value", [None, 1.5, [], {}, 2**63, "x", True])
@pytest.mark.parametrize("key", FFN)
def test_an_ffn_in_the_section(tmp_path: Path, tiny_checkpoint: Path, key: str, value: Any) -> None:
    if (key in FFN[:4] and value == "x") or (key in FFN[6:] and value is True):
        return
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    edit(folder / "config.json", lambda config: config["ifpruning"]["ffns"][0].update({key: value}))
    write_manifest(folder, source="test", licence=None)
    refusal(lambda: Checkpoint.open(folder))


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "changes",
    [
        *({"dtype": value} for value in ([], {}, None, 5, "F33", True)),
        *({"shape": value} for value in ("1", None, [1.0], [True], ["1"], [-1, -1], [2**63], [2**31, 0], {"a": 1})),
        *(
            {"data_offsets": value}
            for value in ([], [0], [0, 4, 8], "04", [0.0, 4.0], [None, 4], [4, 0], [2**63, 2**64])
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["header", "source", "checkpoint", "predictor"])
def test_a_safetensors_header(tmp_path: Path, tiny_checkpoint: Path, where: str, changes: dict[str, Any]) -> None:
    text = json.dumps({"model.norm.weight": ENTRY | changes}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(4)
    file = tmp_path / "model.safetensors"
    call: Callable[[], object] = lambda: read_safetensors_header(file)  # noqa: E731
    if where == "source":
        file = write_source(tmp_path / "source") / "model.safetensors"
        call = lambda: open_source(file.parent)  # noqa: E731
    elif where == "checkpoint":
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
        file = folder / "model-00001-of-00001.safetensors"
        edit(folder / "manifest.json", lambda all: all["files"][file.name].update(size=len(data)))
        call = lambda: Checkpoint.open(folder)  # noqa: E731
    elif where == "predictor":
        folder = write_predictor(tmp_path / "predictor", (128, 128))
        file = folder / "head.safetensors"
        call = lambda: open_predictor(folder, (128, 128))  # noqa: E731
    file.write_bytes(data)
    assert str(file) in refusal(call)


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", '{"__metadata__": 5}', '{"__metadata__": [1]}', '{"a": null}', '{"\\ud800": {}}']
)
def test_a_header_that_is_something_else(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    refusal(lambda: read_safetensors_header(file))


def test_a_header_that_names_any_number_of_tensors(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    header = {f"t.{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(70_000)}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "names 70000 tensors, more than any model's file" in refusal(lambda: open_source(source))


# Special files.


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def unix_socket(file: Path) -> None:
    file.unlink(missing_ok=True)
    here = Path.cwd()
    os.chdir(file.parent)  # the address has room for about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(file.name)
    finally:
        os.chdir(here)


def endless(file: Path) -> None:
    file.touch()
    os.truncate(file, 1 << 33)  # a sparse file


SPECIAL = pytest.mark.parametrize("make", [pipe, device, unix_socket, endless], ids=lambda make: make.__name__)
FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"]


@SPECIAL
@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json", "tokenizer.model", "chat_template.jinja"])
def test_in_a_source(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    source = write_source(tmp_path / "source")
    make(source / name)
    assert name in refusal(lambda: convert(open_source(source), tmp_path / "out", Options()))


@SPECIAL
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "generation_config.json", "tokenizer.json"])
def test_in_a_checkpoint(tmp_path: Path, tiny_checkpoint: Path, name: str, make: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    make(folder / name)
    refusal(lambda: load(folder))


@SPECIAL
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_in_a_predictor(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    folder = write_predictor(tmp_path / "predictor", (128, 128))
    make(folder / name)
    refusal(lambda: open_predictor(folder, (128, 128)))
    refusal(lambda: SparsityPredictor.load(folder))


@SPECIAL
@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_a_licence_is_not_worth_waiting_for(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    source = write_source(tmp_path / "source")
    make(source / name)
    if make is endless:
        assert open_source(source).licence is None
    else:
        assert name in refusal(lambda: open_source(source))


@pytest.mark.parametrize("make", [pipe, device, unix_socket], ids=lambda make: make.__name__)
def test_as_the_source_itself(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for name in ("model.gguf", "model", "model.safetensors"):
        make(tmp_path / name)
        assert "is no ordinary file" in refusal(lambda name=name: open_source(tmp_path / name))
