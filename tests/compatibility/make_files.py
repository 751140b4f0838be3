"""Made `files.tar.gz` and `expected.json` with the code of commit 3018b37, before the packages got their present names.

It runs in a checkout of that commit, whose module names it imports, and need not run again:

    git worktree add /tmp/before 3018b37 && cd /tmp/before
    PYTHONPATH=.:convert python THIS_FILE OUTPUT_FOLDER

Weights are random float16; whatever is compared was computed in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_convert.pipeline import Options
from ifprune_mlx import History, Instruction, Session, TaskStore, load, make_selector, stream_generate
from ifprune_mlx.checkpoint import Quantization
from ifprune_mlx.predictor import Head
from ifprune_mlx.selection_cache import SelectionCache
from ifprune_mlx.selectors import use_selection_cache
from ifprune_mlx.train.records import Record
from tests.tiny import write_checkpoint, write_source

DENSITY = 0.5
TEXT = "Write a haiku about rain."
TOKENS = list(range(40, 60))
SHOWN = 24
"""Logits that are kept of every answer's first token."""


def write_predictor(folder: Path) -> Path:
    """A predictor with a backbone of its own, of one small layer."""
    write_source(folder, "qwen2", seed=7, num_hidden_layers=1, intermediate_size=64)
    weights = mx.load(str(folder / "model.safetensors"))
    half = {name: array.astype(mx.float16) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, {"format": "mlx"})
    mx.random.seed(8)
    first, second = mx.random.normal((32, 64)), mx.random.normal((256, 32))
    Head(first, None, second, mx.random.normal((256,)), (128, 128)).save(folder / "head.safetensors")
    return folder


def write_checkpoints(work: Path, out: Path) -> list[str]:
    """One of every kind: tensors and records, packed, with a predictor."""
    chats = [
        Record(({"role": "user", "content": f"{n} {TEXT}"}, {"role": "assistant", "content": "Yes."})) for n in range(6)
    ]
    options = {
        "tensors": Options(dtype=mx.float16, density=DENSITY),
        "records": Options(dtype=mx.float16, density=DENSITY, order=chats),
        "packed": Options(Quantization(32, 4, "affine"), dtype=mx.float16, density=DENSITY),
        "learned": Options(dtype=mx.float16, density=DENSITY, predictor=write_predictor(work / "predictor")),
    }
    for seed, (name, option) in enumerate(options.items()):
        write_checkpoint(work / name, "llama" if name != "packed" else "llama-bias", option, seed=seed)
        shutil.copytree(work / name, out / name)
    return list(options)


def logits(model: Any) -> list[float]:
    """Of the token after TOKENS, under what is active; the first ones."""
    found = np.array(model(mx.array([TOKENS]))[0, -1].astype(mx.float32))
    best = np.sort(found)[-2:]
    assert best[1] - best[0] > 1e-2, "a greedy choice so close may differ on another machine"
    return [float(value) for value in found[:SHOWN]]


def measured(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, selects and answers."""
    model, tokenizer = load(folder, dtype=mx.float32)
    names = ["activation", "static", "random", *(["learned"] if model.checkpoint.has_predictor else [])]
    found: dict[str, Any] = {
        "id": model.checkpoint.id,
        "keep": list(model.keep()),
        "dense": logits(model),
        "selected": {},
    }
    for name in names:
        tokens = tuple(tokenizer.encode(TEXT))
        selection = make_selector(model, name, seed=3).select(Instruction(TEXT, tokens), model.keep()).selection
        model.switch(selection)
        answer = [r.token for r in stream_generate(model, tokenizer, TOKENS, selection=selection, max_tokens=8)]
        found["selected"][name] = {"hash": selection.hash, "logits": logits(model), "answer": answer}
    return found


def write_state(out: Path) -> dict[str, Any]:
    """A selection, a task, a cached selection, a saved chat and a prompt cache of the checkpoint with a predictor."""
    model, tokenizer = load(out / "learned", dtype=mx.float32)
    random = make_selector(model, "random", seed=5).select(Instruction(TEXT, ()), model.keep()).selection
    random.save(out / "selection.safetensors")
    TaskStore(model.checkpoint, out / "data").save("haiku", random)
    use_selection_cache(model, SelectionCache(out / "cache"))
    chat = Session(model, tokenizer, policy="first", system_prompt="Be brief.")
    chat.ask(TEXT, max_tokens=6)
    chat.save(out / "chat.json")
    learned = chat.selection
    second = [response.token for response in chat.stream("And snow?", max_tokens=6)]
    model.switch(None)
    history = History.empty(model).read(model, TOKENS[:7])
    model.switch(random)
    history.read(model, TOKENS[7:])
    history.save(out / "prompt.safetensors", model)
    options = {"selection": random, "on_switch": "keep", "max_tokens": 6}
    goes_on = [r.token for r in stream_generate(model, tokenizer, [60, 61], prompt_cache=history, **options)]
    return {
        "selection": random.hash,
        "learned": learned.hash,
        "chat": {"messages": chat.messages[:2], "second_answer": second},
        "prompt_cache": {"spans": [[7, "dense"], [len(TOKENS) - 7, random.hash]], "goes_on": goes_on},
    }


def main() -> None:
    here = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        work, out = Path(name) / "work", Path(name) / "files"
        work.mkdir()
        out.mkdir()
        names = write_checkpoints(work, out)
        expected = {"text": TEXT, "tokens": TOKENS, "checkpoints": {name: measured(out / name) for name in names}}
        expected |= write_state(out)
        (here / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
        with tarfile.open(here / "files.tar.gz", "w:gz") as archive:
            archive.add(out, "files")


if __name__ == "__main__":
    main()
