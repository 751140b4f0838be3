"""Lets the published dense model answer prompts, and writes its answers as chats, one file for each file of prompts.

    python scripts/make_own_answers.py --model BASE --out FOLDER --count 150 SOURCES/*.jsonl

BASE is a plain checkpoint of the model (no adapter). A call that was stopped goes on when it is given again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx

from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.data.own_answers import write_own_answers
from ifprune_mlx.model import load


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
    for file in given.files:
        records = read_records(file, file.stem)
        order = shuffled(len(records), f"own/{file.stem}")[: given.count]
        began = time.perf_counter()
        chats = write_own_answers(
            given.out / file.name,
            model.module,
            tokenizer,
            [records[int(index)] for index in order],
            max_length=given.max_length,
            batch_size=given.batch_size,
            temperature=given.temperature,
            source=str(given.model),
        )
        print(f"{file.stem}: {len(chats)} chats, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
