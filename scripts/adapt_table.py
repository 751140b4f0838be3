"""Prints the table of docs/guide/adapt.md: what each stage of `ifprune adapt` takes of memory and disk.

    python -m scripts.adapt_table                           by the estimate alone, in seconds
    python -m scripts.adapt_table --measure 2 4             beside it, what stages took at so many layers, and what
                                                            follows for all of them
    python -m scripts.adapt_table --shape small --measure 4 12 --length 32 --unpacked --float32
                                                            the same for a model that is measured in minutes

The model is noise of Llama-3.1-8B's shape. Each measurement is a process of its own that runs every stage, as short as
it can be: memory does not depend on how many steps there are. `peak` is what the process had resident, without files
that the system can drop; it begins anew with each stage. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ifprune_convert.adapt import STAGES, AdaptConfig, adapt
from ifprune_convert.adapt.config import Stage
from ifprune_convert.adapt.memory import Need, Shapes, needs
from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_convert.readers import open_source
from scripts.make_synthetic import CONFIG, llama_shapes, process_memory, write_shards
from scripts.memory_table import EXAMPLES, Example
from scripts.memory_table import write_source as write_hollow_source
from scripts.paper_9b import bfloat16_noise

SHAPES: dict[str, dict[str, Any]] = {
    "8b": EXAMPLES["8b"].config,
    "small": CONFIG
    | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
}
_CHATS = 2000  # the most that `calibrate` measures
_SIZES: dict[Any, int] = {"convert": 1, "answers": 64, "calibrate": 20, "select": 1, "heal": 2, "evaluate": 8}
_TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}<e>{% endfor %}{% if add_generation_prompt %}<u>{% endif %}"
_SPECIAL = ["<e>", "<u>"]
_INTERVAL_S = 0.01


def write_source(folder: Path, config: dict[str, Any]) -> Path:
    """The dense model, with a tokenizer that has a word for every token."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*_SPECIAL, *alphabet, *(f"w{n}" for n in range(config["vocab_size"]))][: config["vocab_size"]]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_shards(folder, list(llama_shapes(config)), "BF16", bfloat16_noise())
    return folder


@dataclass(frozen=True)
class Settings:
    """How a model is adapted.

    Attributes:
        length: most tokens of a chat.
        packed: to 4 bits.
        float32: what is computed in; else the source's bfloat16.
    """

    length: int
    packed: bool
    float32: bool

    @property
    def options(self) -> Options:
        """Of the conversion."""
        quantization = quantization_of("affine", 64, 4) if self.packed else None
        return Options(quantization=quantization, dtype=mx.float32 if self.float32 else None)


def config_of(source: Path, settings: Settings) -> AdaptConfig:
    """The job, with prompts of two domains."""
    data = {}
    for domain in ("code", "maths"):
        data[domain] = source.with_name(f"{domain}.jsonl")
        chats = ({"prompt": f"{domain} {number}?", "completion": "none"} for number in range(60))
        data[domain].write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    return AdaptConfig(
        model=source,
        output=source.with_name("out"),
        data=data,
        quantization=settings.options.quantization,
        dtype=settings.options.dtype,
        max_seq_length=settings.length,
    )


def measured(config: dict[str, Any], settings: Settings, last: str) -> dict[str, dict[str, float]]:
    """`measure` of a model that is written for it."""
    with tempfile.TemporaryDirectory(prefix="ifprune-adapt-") as folder:
        source = write_source(Path(folder) / "source", config)
        return measure(config_of(source, settings), last)


def estimated(config: dict[str, Any], settings: Settings, chats: int) -> Mapping[Stage, Need]:
    """What the plan of `adapt` says of such a model; its source has a header but no content."""
    with tempfile.TemporaryDirectory(prefix="ifprune-adapt-") as folder:
        example = Example("", config, "BF16", None, 1.0, None)
        write_hollow_source(Path(folder) / "source", example)
        shapes = Shapes.of(open_source(Path(folder) / "source"), settings.options)
        return needs(shapes, settings.length, chats)


class _Enough(Exception):
    """The stages that are wanted are done."""


def measure(config: AdaptConfig, last: str) -> dict[str, dict[str, float]]:
    """Run the job in this process; per stage, bytes resident and MLX's own peak, bytes of the job's folder, seconds."""
    found: dict[str, dict[str, float]] = {}
    peak, began, ended = [0], time.perf_counter(), threading.Event()

    def sample() -> None:
        while not ended.wait(_INTERVAL_S):
            peak[0] = max(peak[0], process_memory(os.getpid(), "RssAnon"))

    def note(line: str) -> None:
        nonlocal began
        print(line, file=sys.stderr, flush=True)
        stage = line.partition(":")[0]
        if stage in STAGES and ": done in" in line:
            disk = sum(file.stat().st_size for file in config.work.rglob("*") if file.is_file())
            now = time.perf_counter()
            found[stage] = {"memory": peak[0], "mlx": mx.get_peak_memory(), "disk": disk, "seconds": now - began}
            print(f"{stage} {found[stage]}", file=sys.stderr, flush=True)
            mx.reset_peak_memory()
            peak[0], began = 0, now
            if stage == last:
                raise _Enough

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with suppress(_Enough):
            adapt(config, progress=_silent, note=note, sizes=_SIZES)
    finally:
        ended.set()
        sampler.join()
    return found


@contextmanager
def _silent(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def table(
    config: dict[str, Any],
    whole: Mapping[Stage, Need],
    small: Mapping[int, Mapping[Stage, Need]],
    found: Mapping[int, dict[str, dict[str, float]]],
) -> str:
    """In Markdown; gigabytes are 10^9 bytes.

    Args:
        whole: the estimate for all layers.
        small: for so many.
        found: measured at so many.
    """
    layers = config["num_hidden_layers"]
    head = ["stage", f"memory, {layers} layers", f"disk, {layers} layers"]
    head += [f"memory, {n} layers: estimate / measured" for n in found]
    head += [f"measured, for {layers} layers"] if len(found) > 1 else []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for stage in STAGES:
        cells = [f"`{stage}`", _gigabytes(whole[stage].memory), _gigabytes(whole[stage].disk)]
        at = {n: stages[stage]["memory"] for n, stages in found.items() if stage in stages}
        cells += [
            f"{small[n][stage].memory / 1e9:.2f} / {at[n] / 1e9:.2f} GB" if n in at else "not measured" for n in found
        ]
        if len(found) > 1:
            cells.append(_gigabytes(_line(at, layers)) if len(at) > 1 else "not measured")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _line(at: Mapping[int, float], layers: int) -> float:
    """On the line through the first and the last measurement."""
    first, last = min(at), max(at)
    return at[last] + (at[last] - at[first]) / (last - first) * (layers - last)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--measure", type=int, nargs="+", default=[], metavar="LAYERS")
    parser.add_argument("--last", choices=STAGES, default=STAGES[-1], help="measure no stage after it")
    parser.add_argument("--length", type=int, default=256, help="most tokens of a chat")
    parser.add_argument("--unpacked", action="store_true", help="do not pack weights to 4 bits")
    parser.add_argument("--float32", action="store_true", help="compute in it: quicker on a CPU, and more memory")
    arguments = parser.parse_args()
    config, settings = SHAPES[arguments.shape], Settings(arguments.length, not arguments.unpacked, arguments.float32)
    small, found = {}, {}
    for layers in arguments.measure:
        part = config | {"num_hidden_layers": layers}
        small[layers] = estimated(part, settings, _SIZES["calibrate"])
        # A process of its own each, whose memory nothing else was in.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[layers] = pool.submit(measured, part, settings, arguments.last).result()
    print(table(config, estimated(config, settings, _CHATS), small, found))


if __name__ == "__main__":
    main()
