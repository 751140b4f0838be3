"""Lets the published dense model answer prompts, and writes its answers as chats, one file for each file of prompts.

    python scripts/make_own_answers.py --model BASE --out FOLDER --count 150 SOURCES/*.jsonl

BASE is a plain checkpoint of the model (no adapter). A call that was stopped goes on, in turns over all files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import mlx.core as mx

from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.data.dataset import Record, read_records
from ifprune_mlx.data.own_answers import own_answers
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import load


def wanted(file: Path, out: Path, count: int) -> list[Record]:
    """The prompts of a file that have no answer yet."""
    records = read_records(file, file.stem)
    chosen = [records[int(index)] for index in shuffled(len(records), f"own/{file.stem}")[:count]]
    try:
        known = {record.key for record in read_records(out, file.stem)} if out.exists() else set()
    except DataError:  # killed in its first line
        known = set()
    return [record for record in chosen if record.key not in known]


def main() -> None:
    """Answer all prompts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150, help="prompts of each file")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.7)
    given = parser.parse_args()
    model, tokenizer = load(given.model, dtype=mx.float32)
    given.out.mkdir(parents=True, exist_ok=True)
    began, done, tokens = time.perf_counter(), 0, 0
    todo = {file: wanted(file, given.out / file.name, given.count) for file in given.files}
    total = sum(map(len, todo.values()))
    for file, records in todo.items():
        with (given.out / file.name).open("a", encoding="utf-8") as lines:
            for chat in own_answers(
                model.module,
                tokenizer,
                records,
                max_length=given.max_length,
                batch_size=given.batch_size,
                temperature=given.temperature,
            ):
                lines.write(json.dumps({"messages": list(chat.messages)}) + "\n")
                lines.flush()
                done += 1
                tokens += len(tokenizer.encode(chat.messages[-1]["content"]))
        rate = tokens / (time.perf_counter() - began)
        print(f"{file.stem}: {done} of {total} prompts, {rate:.0f} answer tokens/s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
