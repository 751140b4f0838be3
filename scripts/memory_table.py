"""Prints the table of docs/guide/memory.md: what `ifprune` answers on Macs of 8 to 64 GB, for three models.

    python -m scripts.memory_table

Checkpoints and sources have their real sizes, in files with headers but no content, which take no disk. The Macs are
descriptions. No Mac was used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifprune_convert.memory_check import check_calibration
from ifprune_convert.packing import plan
from ifprune_convert.pipeline import Options
from ifprune_convert.readers import open_source
from ifprune_convert.skeleton import build_skeleton
from ifprune_mlx.checkpoint.budget import choose_residency, resolve_keep, way_to_load
from ifprune_mlx.checkpoint.ffn_spec import FFNSpec
from ifprune_mlx.checkpoint.format import SECTION, Checkpoint, Layout, Quantization, neuron_shapes, neurons_file
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.device import Device
from ifprune_mlx.errors import BudgetError
from ifprune_mlx.selection.predictor import PREDICTOR_SETTINGS
from ifprune_mlx.sparse.ffn_detection import find_ffns
from scripts.make_synthetic import CONFIG, ROOT, Shapes, llama_shapes, write_tokenizer
from scripts.paper_9b import BACKBONE, KEPT, MODEL, predictor_shapes

# Metal's recommended working set as llama.cpp logs it: two thirds of the memory, and three quarters from 64 GB on.
# Newer systems give more (a 16 GB M4: 12.7 GB).
MACS = {
    size: Device(size << 30, (size << 30) * 3 // 4 if size >= 64 else (size << 31) // 3) for size in (8, 16, 32, 64)
}
_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "U32": 4}
_SMOLLM2 = ROOT / "convert" / "ifprune_convert" / "data" / "smollm2-135m-instruct" / "predictor" / "head.safetensors"


@dataclass(frozen=True)
class Example:
    """A model of the table.

    Attributes:
        title: in the table.
        config: of the source, a llama.
        dtype: of the source's tensors, in safetensors' words.
        quantization: of the checkpoint.
        density: of the checkpoint.
        predictor: `shared` is SmolLM2's, which reads with the model's first layers; `own` is the paper's; None is none.
    """

    title: str
    config: dict[str, Any]
    dtype: str
    quantization: Quantization | None
    density: float
    predictor: str | None

    @property
    def options(self) -> Options:
        """How it is converted, with calibration."""
        from ifprune_convert.calibrate import SHIPPED

        return Options(quantization=self.quantization, density=self.density, calibration=SHIPPED)


_SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
EXAMPLES = {
    "smollm2": Example("SmolLM2-135M, float16", CONFIG | _SMALL, "F16", None, 0.75, "shared"),
    "8b": Example("8B (Llama 3's shape), 4 bit", CONFIG | _LARGE, "BF16", Quantization(64, 4, "affine"), 0.9, None),
    "9b": Example("the paper's 9B, bf16", MODEL, "BF16", None, round(KEPT, 4), "own"),
}


def write_hollow(
    file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with a header and no content: a hole, which takes no disk."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def write_source(folder: Path, example: Example) -> None:
    """Write the dense model."""
    folder.mkdir()
    kind = {"F16": "float16", "BF16": "bfloat16"}[example.dtype]
    (folder / "config.json").write_text(json.dumps(example.config | {"torch_dtype": kind}))
    write_tokenizer(folder)
    shapes: Shapes = {}
    for group in llama_shapes(example.config):
        shapes |= group
    write_hollow(folder / "model.safetensors", {name: (example.dtype, shape) for name, shape in shapes.items()})


def write_checkpoint(folder: Path, example: Example) -> None:
    """Write the IFP checkpoint."""
    folder.mkdir()
    config, packed, dtype = example.config, example.quantization, example.dtype
    width, hidden, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    leaves = ("gate_proj", "up_proj", "down_proj")
    specs = tuple(FFNSpec(f"model.layers.{n}.mlp", *leaves, width, hidden, False, False) for n in range(layers))
    selector = "activation" if example.predictor is None else "learned"
    layout = Layout(specs, example.density, selector, packed, packed)
    section = {} if packed is None else {"quantization": packed.to_dict()}
    (folder / "config.json").write_text(json.dumps(config | section | {SECTION: layout.to_dict()}))
    for index, spec in enumerate(specs):
        shapes = neuron_shapes(spec, layout)
        tensors = {name: (_dtype(name, packed, dtype), shape) for name, shape in shapes.items()}
        write_hollow(folder / neurons_file(index, layers), tensors)
    others: dict[str, tuple[str, tuple[int, ...]]] = {}
    for group in llama_shapes(config):
        for name, shape in group.items():
            if ".mlp." not in name:
                others |= dict(_stored(name, shape, packed, dtype))
    write_hollow(folder / "model-00001-of-00001.safetensors", others)
    kinds = ("prior", "down_norm")
    priors = {f"{kind}.{n}": ("F32", (hidden,)) for kind in kinds for n in range(layers)}
    write_hollow(folder / "priors.safetensors", priors)
    if example.predictor is not None:
        (folder / "predictor").mkdir()
        if example.predictor == "shared":
            shutil.copy(_SMOLLM2, folder / "predictor")
        else:
            backbone = {name: ("BF16", shape) for name, shape in predictor_shapes(config, BACKBONE).items()}
            write_hollow(folder / "predictor" / "model.safetensors", backbone)
            settings = {PREDICTOR_SETTINGS: json.dumps({"layers": None})}
            write_hollow(folder / "predictor" / "head.safetensors", {}, settings)
    write_manifest(folder, source=example.title, licence=None, hashed=False)


def _dtype(name: str, packed: Quantization | None, dtype: str) -> str:
    return "U32" if packed is not None and name.endswith(".weight") else dtype


def _stored(
    name: str, shape: tuple[int, ...], packed: Quantization | None, dtype: str
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """A tensor as the checkpoint has it, maybe packed: name, and type with shape."""
    if packed is None or len(shape) < 2:
        yield name, (dtype, shape)
        return
    stem, (rows, columns) = name.removesuffix(".weight"), shape
    yield name, ("U32", (rows, columns * packed.bits // 32))
    for part in ("scales", "biases"):
        yield f"{stem}.{part}", (dtype, (rows, columns // packed.group_size))


def answers(folder: Path, name: str, device: Device) -> dict[str, str]:
    """What `info`, `load` and `convert --calibrate` say of an example in a folder."""
    checkpoint, example = Checkpoint.open(folder / name), EXAMPLES[name]
    told, command = way_to_load(checkpoint, device)
    said = {"info": f"{told}: `{command}`" if told else f"`{command}`"}
    try:
        residency = choose_residency(checkpoint, None, None, device=device)
        resolve_keep(checkpoint, residency=residency, device=device)
        said["load"] = f"yes, {residency}"
    except BudgetError as exc:
        said["load"] = _refused(exc)
    source = open_source(folder / f"{name}-source")
    skeleton = build_skeleton(source.path, source.config, len(source.shapes))
    specs = find_ffns(skeleton, str(source.config["model_type"]))
    packing = plan(source, skeleton, specs, example.quantization, False)
    try:
        check_calibration(source, folder / f"my-{name}", example.options, specs, packing, device)
        said["convert"] = "yes"
    except BudgetError as exc:
        said["convert"] = _refused(exc)
    return said


def _refused(exc: BudgetError) -> str:
    reason, _, command = str(exc).rpartition(": ")
    sysctl = "; more with `iogpu.wired_limit_mb`" if "iogpu" in reason else ""
    return f"no{sysctl}: `{command}`"


def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| model | Mac | weights may take | `info` says | loads | `convert --calibrate` |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="ifprune-memory-") as folder:
        for name, example in EXAMPLES.items():
            write_examples(Path(folder), name)
            for size, device in MACS.items():
                said = answers(Path(folder), name, device)
                cells = (example.title, f"{size} GB", f"{device.usable / 1e9:.1f} GB", *said.values())
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace(f"{folder}/", "")


def write_examples(folder: Path, name: str) -> None:
    """Write an example's checkpoint and its source."""
    write_checkpoint(folder / name, EXAMPLES[name])
    write_source(folder / f"{name}-source", EXAMPLES[name])


if __name__ == "__main__":
    print(table())
