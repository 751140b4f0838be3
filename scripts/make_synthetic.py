"""Writes a synthetic float16 checkpoint of the paper's widths, and measures what converting it takes.

    python scripts/make_synthetic.py FOLDER                 write it (3.1 GB with 7 layers)
    python scripts/make_synthetic.py --measure              write it to a temporary folder, convert it, print JSON
    python scripts/make_synthetic.py --measure --kill       the same, but a first conversion is killed half way

Memory is anonymous RSS (what the system cannot drop and read again), summed over the converting process and all below
it, sampled every 20 ms. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
Shapes = dict[str, tuple[int, ...]]
# Numbers of noise that are repeated; prime, so that no two rows or layers begin at the same one.
BLOCK = 2_097_143
ONES = {"F16": b"\x00\x3c", "BF16": b"\x80\x3f"}
_INTERVAL_S = 0.02


@dataclass(frozen=True)
class Watched:
    """What a child process took, with all below it. Memory in bytes.

    Attributes:
        cpu_seconds: of all threads; on a busy machine far less than `seconds`.
        peak_anonymous_rss: what the system cannot drop and read again, by samples.
        peak_rss: the kernel's own peak of all that was resident.
        answer: the JSON object on its standard output.
    """

    seconds: float
    cpu_seconds: float
    peak_anonymous_rss: int
    peak_rss: int
    samples: int
    answer: dict[str, Any]


def write_checkpoint(folder: Path, layers: int, vocabulary: int) -> int:
    """Write config, tokenizer, and one float16 shard per layer, never more than a few megabytes of it in memory.

    Returns:
        Bytes of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder)
    noise = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(np.float16)
    return write_shards(folder, list(llama_shapes(config)), "F16", noise.tobytes())


def llama_shapes(config: dict[str, Any]) -> Iterator[Shapes]:
    """The tensors of a llama by name: the embeddings, each layer, and what comes last."""
    width, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    yield {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    last: Shapes = {"model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        last["lm_head.weight"] = (config["vocab_size"], width)
    yield last


def write_shards(folder: Path, shards: list[Shapes], dtype: str, noise: bytes) -> int:
    """Write `model-*.safetensors` and their index.

    Args:
        dtype: a type of 2 bytes, in the words of safetensors.
        noise: bytes of such numbers, repeated without end from tensor to tensor.

    Returns:
        Bytes of weights.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += write_safetensors(folder / name, shapes, dtype, noise, total)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_safetensors(file: Path, shapes: Shapes, dtype: str, noise: bytes, start: int = 0) -> int:
    """Write one file of tensors; `start` is how many bytes of the endless noise were used before. Norms are ones.

    Returns:
        Bytes of weights.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = memoryview(noise)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left = 2 * math.prod(shape)
            if name.endswith("norm.weight"):
                start += out.write(ONES[dtype] * (left // 2))
                continue
            while left:
                at = start % len(noise)
                done = out.write(block[at : at + left])
                start, left = start + done, left - done
    return end


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def start_ifprune(*arguments: str) -> subprocess.Popen[bytes]:
    """`ifprune` as its own process, whose standard output is a pipe."""
    paths = [str(ROOT), str(ROOT / "convert"), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "ifprune_cli.main", *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def start_conversion(source: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """`ifprune convert --json` as its own process."""
    return start_ifprune("convert", "--json", "--model", str(source), "--mlx-path", str(out), *options)


def process_memory(process: int, field: str, parent: bytes | None = None) -> int:
    """Bytes of a field of Linux' process status, of a process and all below it; 0 for those that are gone.

    Args:
        parent: the command line of the parent, if it is counted too.
    """
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
        # A child that was forked and does not run a program of its own yet shows the memory of its parent once more.
        if command == parent:
            return 0
        status = Path(f"/proc/{process}/status").read_text()
        children = [Path(task, "children").read_text().split() for task in Path(f"/proc/{process}/task").iterdir()]
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)
    return own + sum(process_memory(int(child), field, command) for group in children for child in group)


def watch(process: subprocess.Popen[bytes]) -> Watched:
    """Wait for an `ifprune ... --json` that was just started, and say what it took.

    Raises:
        SystemExit: if it fails.
    """
    start, cpu = time.perf_counter(), _children_cpu()
    anonymous = resident = samples = 0
    try:
        while process.poll() is None:
            anonymous = max(anonymous, process_memory(process.pid, "RssAnon"))
            resident = max(resident, process_memory(process.pid, "VmHWM"))
            samples += 1
            time.sleep(_INTERVAL_S)
    finally:
        process.kill()
        process.wait()
    seconds, cpu = time.perf_counter() - start, _children_cpu() - cpu
    assert process.stdout is not None
    with process.stdout as stdout:
        answer = stdout.read()
    if process.returncode:
        raise SystemExit(f"the process ended with code {process.returncode}")
    return Watched(round(seconds, 2), round(cpu, 2), anonymous, resident, samples, json.loads(answer.splitlines()[-1]))


def _children_cpu() -> float:
    """CPU seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Convert `source`, and say what it took.

    Raises:
        SystemExit: if the conversion fails.
    """
    took = asdict(watch(start_conversion(source, out, *options)))
    return took | {"converted": took.pop("answer")}


def kill_half_way(source: Path, out: Path, layers: int) -> None:
    """Start a conversion and kill it when it has written half of the FFNs; what it leaves must not load.

    Raises:
        SystemExit: if the conversion ends before, or an output folder is there.
    """
    process = start_conversion(source, out)
    while len(list(out.parent.glob(f".{out.name}.partial-*/neurons-*"))) <= layers // 2:
        if process.poll() is not None:
            raise SystemExit("the conversion ended before it could be killed")
        time.sleep(_INTERVAL_S)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if out.exists() or not list(out.parent.glob(f".{out.name}.partial-*")):
        raise SystemExit("the killed conversion left an output folder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write; a temporary folder with --measure")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=100352)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to `ifprune convert`")
    arguments = parser.parse_args()
    if not arguments.measure and arguments.folder is None:
        parser.error("give a folder, or --measure")
    with tempfile.TemporaryDirectory(prefix="ifprune-synthetic-") as temporary:
        source = arguments.folder or Path(temporary) / "source"
        result: dict[str, Any] = {"layers": arguments.layers}
        result["source_bytes"] = write_checkpoint(source, arguments.layers, arguments.vocabulary)
        if arguments.measure:
            out = Path(temporary) / "out"
            if arguments.kill:
                kill_half_way(source, out, arguments.layers)
            result |= measure(source, out, *arguments.options)
            left = sorted(entry.name for entry in out.parent.iterdir() if entry.name.startswith("."))
            if left:
                raise SystemExit(f"left behind: {left}")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
