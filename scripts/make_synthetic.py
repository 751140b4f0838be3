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
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
_INTERVAL_S = 0.02


def write_checkpoint(folder: Path, layers: int, vocabulary: int) -> int:
    """Write config, tokenizer, and one shard per layer, never more than a few megabytes of it in memory.

    Returns:
        Bytes of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    shards = list(_shards(config))
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 21).astype(np.float16).tobytes()
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / name, shapes, noise)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each shard, with their shapes."""
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
    yield {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], noise: bytes) -> int:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                left -= out.write(noise[:left])
    return end


def _write_tokenizer(folder: Path) -> None:
    """Every byte is a token."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def start_conversion(source: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """`ifprune convert --json` as its own process."""
    paths = [str(ROOT), str(ROOT / "convert"), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "ifprune_cli.main", "convert", "--json"]
    return subprocess.Popen(
        [*command, "--model", str(source), "--mlx-path", str(out), *options],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def anonymous_rss(process: int) -> int:
    """Bytes of anonymous memory of a process and all below it; 0 for those that are gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = [Path(task, "children").read_text().split() for task in Path(f"/proc/{process}/task").iterdir()]
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    return own + sum(anonymous_rss(int(child)) for group in children for child in group)


def measure(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Convert `source`, and say what it took.

    Raises:
        SystemExit: if the conversion fails.
    """
    start = time.perf_counter()
    process = start_conversion(source, out, *options)
    peak = samples = 0
    while process.poll() is None:
        peak = max(peak, anonymous_rss(process.pid))
        samples += 1
        time.sleep(_INTERVAL_S)
    seconds = time.perf_counter() - start
    assert process.stdout is not None
    with process.stdout as stdout:
        answer = stdout.read()
    if process.returncode:
        raise SystemExit(f"the conversion ended with code {process.returncode}")
    return {
        "peak_anonymous_rss": peak,
        "seconds": round(seconds, 2),
        "samples": samples,
        "converted": json.loads(answer),
    }


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
