"""`ifprune train`: trains a sparsity predictor, stage by stage. The first stage is `distill`."""

from __future__ import annotations

import json as encoder
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .console import note, parameters, progress, result_json
from .loading import load_model
from .options import DataOption, DtypeOption, ModelOption, SeedOption, named_files


class StageName(str, Enum):
    """The stages of training that exist."""

    distill = "distill"


def train(
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where the predictor is written.")],
    data: DataOption = None,
    model: ModelOption = None,
    stage: Annotated[StageName, typer.Option("--stage", help="What to train.")] = StageName.distill,
    layers: Annotated[int, typer.Option("--layers", min=1, help="The predictor reads this many first layers.")] = 12,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Width of the head's inner layer.")] = 128,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most chats of each domain.")] = 2000,
    max_seq_length: Annotated[int, typer.Option("--max-seq-length", min=16, help="Most tokens of a chat.")] = 256,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.0, max=0.9, help="Share of prompts that is never trained on.")
    ] = 0.15,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a bad line instead of leaving it out.")] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a predictor: measure which neurons answers use, and learn to tell from the instruction.

    What was measured is kept in OUTPUT/targets: a run that was stopped goes on there. Put the result into a checkpoint
    with: ifprune convert --predictor OUTPUT/predictor ...
    """
    from ifprune_mlx import DataError
    from ifprune_mlx.train.distill import distill
    from ifprune_mlx.train.encoding import encode_all
    from ifprune_mlx.train.mixture import shuffled
    from ifprune_mlx.train.records import read_records, split
    from ifprune_mlx.train.targets import measure

    files = named_files(data or [])
    if not files:
        raise DataError("training needs data; give --data NAME=FILE.jsonl, once for every domain")
    loaded, tokenizer = load_model(model, dtype, trust_remote_code=False)
    depth = len(loaded.layers)
    if layers > depth:
        raise DataError(f"--layers {layers}: the model has {depth}; give at most that")
    domains = []
    for name, file in files.items():
        records = read_records(file, name, strict=strict, report=note)
        kept = [record for record in records if split(record, held_out) == "train"]
        chosen = [kept[index] for index in shuffled(len(kept), f"{seed}-{name}")[:limit]]
        domains.append(encode_all(tokenizer, chosen, max_seq_length, note))
        note(f"{name}: {len(domains[-1])} chats")
    # In turn, so that a run that is stopped early has measured every domain alike.
    longest = max(map(len, domains))
    chats = [domain[index] for index in range(longest) for domain in domains if index < len(domain)]
    start = time.perf_counter()
    with progress("measure", "chats") as update:
        targets = measure(loaded, chats, output / "targets", layers, update)
    fit = distill(targets, rank=rank, seed=seed)
    folder = output / "predictor"
    folder.mkdir(parents=True, exist_ok=True)
    fit.head.save(folder / "head.safetensors")
    size = fit.head.first.size + fit.head.second.size + sum(fit.head.widths)
    result = {
        "stage": stage.value,
        "path": str(folder),
        "chats": len(targets.features),
        "parameters": size,
        "penalty": fit.penalty,
        "explained": fit.explained[fit.penalty],
        "seconds": time.perf_counter() - start,
    }
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write(encoder.dumps(result | {"by_penalty": fit.explained}) + "\n")
    if json:
        result_json(result)
        return
    print(folder)
    note(
        f"{len(targets.features)} chats, {parameters(size)} parameters; of what differs between held-out answers it "
        f"predicts {100 * fit.explained[fit.penalty]:.1f} %"
    )
