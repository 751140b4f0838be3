"""Sound inputs of every kind, for the fuzz to damage: each in a folder of its own."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, Selection, Session, TaskStore, load
from tests.convert.tiny_adapter import write_adapter
from tests.tiny import write_source
from tests.tiny_gguf import CONFIG as GGUF_CONFIG
from tests.tiny_gguf import make_model, write_gguf
from tests.tiny_predictor import write_predictor

YAML = """stage: sft
learning-rate: 5e-4
iters: 4
batch_size: 2
densities: [0.5, 0.25]
weight: {a: 2}
selector: [learned, static]
strict: true
limit: null
"""
CHATS: list[dict[str, Any]] = [
    {"prompt": "sort 1", "completion": "done"},
    {"messages": [{"role": "user", "content": "add 2"}, {"role": "assistant", "content": "3"}]},
    {"text": "once upon a time"},
    {"query": "q", "choices": ["a", "b"], "gold": 0},
    {"prompt": "2+2?", "answer": "4"},
]
BODY: dict[str, Any] = {
    "model": "x",
    "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["x"],
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "seed": 1,
}
TEXT_BODY: dict[str, Any] = {"model": "x", "prompt": "hi", "max_tokens": 3, "logprobs": 2, "n": 1, "echo": False}


def write_corpus(folder: Path) -> Path:
    """Write every kind of input to a folder of its name below `folder`; returns `folder`."""
    source = write_source(folder / "source" / "model")
    checkpoint = folder / "checkpoint" / "model"
    predictor = write_predictor(folder / "predictor" / "predictor")
    convert(open_source(source), checkpoint, Options(predictor=predictor))
    for name in (
        "adapter",
        "gguf",
        "selection",
        "task",
        "chat",
        "cache",
        "prior",
        "yaml",
        "data",
        "evaluation",
        "body",
        "names",
    ):
        (folder / name).mkdir()
    write_adapter(folder / "adapter" / "adapter", source)
    config = {**GGUF_CONFIG, "model_type": "llama"}
    write_gguf(folder / "gguf" / "model.gguf", config, make_model(config))
    ids = tuple(np.arange(8, dtype=np.int32) for _ in range(2))
    Selection(ids, (128, 128), "static").save(folder / "selection" / "selection.safetensors")
    saved = TaskStore(Checkpoint.open(checkpoint), folder / "task" / "data").save(
        "mine", Selection(ids, (128, 128), "static")
    )
    assert saved.is_file()
    shutil.copyfile(checkpoint / "priors.safetensors", folder / "prior" / "prior.safetensors")
    _write_conversation(folder, checkpoint)
    (folder / "yaml" / "run.yaml").write_text(YAML)
    lines = "".join(json.dumps(line) + "\n" for line in CHATS)
    (folder / "data" / "data.jsonl").write_text(lines)
    (folder / "data" / "data.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = [{"selector": name, "domain": "a", "nll": 1.0, "tokens": 3, "n": 1} for name in ("dense", "static")]
    curve = [{"active_parameters": 5, "density": 0.5, "rows": rows}, {"active_parameters": 9, "rows": rows}]
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps({"total_parameters": 9, "curve": curve}))
    (folder / "body" / "chat.json").write_text(json.dumps(BODY))
    (folder / "names" / "name.json").write_text(json.dumps({"name": "x"}))
    (folder / "names" / "at").mkdir()
    (folder / "body" / "text.json").write_text(json.dumps(TEXT_BODY))
    return folder


def _write_conversation(folder: Path, checkpoint: Path) -> None:
    """A saved chat, and a saved prompt cache."""
    model, tokenizer = load(checkpoint)
    mx.random.seed(0)
    session = Session(model, tokenizer, seed=0)
    session.ask("hello", max_tokens=3)
    session.save(folder / "chat" / "chat.json")
    session.history.save(folder / "cache" / "cache.safetensors", model)
    model.close()
