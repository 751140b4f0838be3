"""What each part of the training is worth, at equal tokens: without `distill`, with stage 1, without the teacher.

    python scripts/ablation.py --model BASE --source GGUF --predictor D/predictor --data code=T/code.jsonl \\
        --data maths=T/maths.jsonl --data general=T/general.jsonl --steps 48 --limit 40 --out FOLDER

BASE is the checkpoint that training begins with, converted from GGUF; D what `ifprune train --stage distill` wrote for
it; T what `make_training_data.py` wrote. Every row trains learned and healed static on the same batches, then both are
converted and evaluated on the same held-out prompts. The first row trains healed dense as well. With stage 1, the steps
of stage 2 are fewer by as many as its tokens cost. What is there from an earlier call is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifprune_mlx.selection.predictor import Head

HELD_OUT = Path(__file__).parent / "held_out"
SHAPE = ["--max-seq-length", "192", "--batch-size", "4", "--learning-rate", "7e-4", "--warmup", "8"]
DENSITY = 0.5


def ifprune(*arguments: object) -> None:
    """Run the command line, or end."""
    print("ifprune", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "ifprune_cli.main", *map(str, arguments)], check=True)


def blank_predictor(source: Path, folder: Path) -> Path:
    """A predictor of the same form that has learned nothing: it scores all neurons alike, whatever the prompt."""
    head = Head.load(source / "head.safetensors")
    mx.random.seed(0)
    first = mx.random.normal(head.first.shape) * head.first.shape[1] ** -0.5
    bias = head.second_bias if head.second_bias is not None else mx.zeros(head.second.shape[0])
    folder.mkdir(parents=True, exist_ok=True)
    Head(first, None, mx.zeros_like(head.second), bias, head.widths, head.pooling, head.activation, head.layers).save(
        folder / "head.safetensors"
    )
    return folder


def as_texts(files: list[str], folder: Path, count: int) -> list[str]:
    """The chats as plain texts, for stage 1; `NAME=FILE` each."""
    folder.mkdir(parents=True, exist_ok=True)
    named = []
    for given in files:
        name, _, file = given.partition("=")
        with Path(file).open(encoding="utf-8") as lines:
            chats = [json.loads(line)["messages"] for _, line in zip(range(count), lines, strict=False)]
        texts = [{"text": "\n\n".join(message["content"] for message in chat)} for chat in chats]
        out = folder / f"{name}.jsonl"
        out.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        named.append(f"{name}={out}")
    return named


def train(out: Path, model: Path, data: list[str], *more: object) -> None:
    """One run of `ifprune train`, if it is not there."""
    if not (out / "finished").is_file():
        given = [part for item in data for part in ("--data", item)]
        ifprune("train", "--model", model, *given, *SHAPE, "--eval-prompts", 0, "--output", out, *more)
        (out / "finished").touch()


def tokens_of(out: Path) -> int:
    """Answer tokens, or text tokens, that every arm of a run was trained on."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(line).get("tokens", 0)) for line in lines)


def evaluated(out: Path, source: Path, limit: int, dense: bool) -> dict[str, Any]:
    """Convert the arms of a run and measure them on the held-out prompts, if that was not done."""
    result = out / "evaluation.json"
    if not result.is_file():
        base = ["convert", "--model", source, "--dtype", "float32", "--prior", out / "prior.safetensors"]
        base += ["--density", DENSITY, "--overwrite"]
        learned = ["--predictor", out / "predictor", "--adapter", out / "adapters" / "learned"]
        ifprune(*base, *learned, "--mlx-path", out / "learned")
        ifprune(*base, "--adapter", out / "adapters" / "static", "--mlx-path", out / "static")
        controls: list[object] = ["--healed-static", out / "static"]
        if dense:
            ifprune(*base, "--adapter", out / "adapters" / "none", "--mlx-path", out / "none")
            controls += ["--healed-dense", out / "none"]
        given = [part for file in sorted(HELD_OUT.glob("*.jsonl")) for part in ("--data", f"{file.stem}={file}")]
        given += ["--max-length", 256, "--limit", limit, "--density", DENSITY, "--selectors", "learned,mismatched"]
        ifprune("evaluate", "--model", out / "learned", *controls, *given, "--json", result)
    loaded: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return loaded


def line(name: str, tokens: int, result: dict[str, Any]) -> str:
    """A row of the table: losses, and learned minus healed static with its interval."""
    losses = {(row["selector"], row["domain"]): row["nll"] for row in result["rows"]}
    found = {(d["a"], d["b"], d["domain"]): d for d in result["differences"]}
    cells = []
    for domain in ("code", "maths", "general"):
        arms = ("learned", "healed-static", "healed-dense")
        means = " ".join(f"{losses[arm, domain]:.3f}" for arm in arms if (arm, domain) in losses)
        gain = found["learned", "healed-static", domain]
        cells.append(f"{means} ({gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}])")
    return f"| {name} | {tokens} | {' | '.join(cells)} |"


def main() -> None:
    """Train, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint that training begins with")
    parser.add_argument("--source", type=Path, required=True, help="the dense model that it was converted from")
    parser.add_argument("--predictor", type=Path, required=True, help="what distill wrote")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--limit", type=int, default=40, help="held-out prompts a domain")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, data, out = given.model, given.data, given.out
    sft = ["--stage", "sft", "--densities", "0.27,0.5", "--limit", 2000]
    head = ["--predictor", given.predictor, "--head-learning-rate", 3e-5]
    both = ["--selector", "learned", "--selector", "static"]
    blank = ["--predictor", blank_predictor(given.predictor, out / "blank"), "--head-learning-rate", 1e-3]

    train(out / "full", model, data, *sft, *head, *both, "--selector", "none", "--iters", given.steps)
    train(out / "no-teacher", model, data, *sft, *head, *both, "--teacher", 0, "--iters", given.steps)
    train(out / "no-distill", model, data, *sft, *blank, *both, "--iters", given.steps)
    # Half of the tokens for stage 1, whose steps have more of them.
    texts = as_texts(data, out / "texts", 2000)
    pretrain = ["--stage", "pretrain", "--densities", "0.27,0.5"]
    first = max(given.steps * 3 // 10, 1)
    train(out / "stage-1", model, texts, *pretrain, *head, *both, "--iters", first)
    rest = round(given.steps * (1 - tokens_of(out / "stage-1") / tokens_of(out / "full")))
    start = ["--start", out / "stage-1", "--head-learning-rate", 3e-5]
    train(out / "both-stages", model, data, *sft, *start, *both, "--iters", max(rest, 1))

    print(
        f"Density {DENSITY}, {given.limit} held-out prompts a domain. Nats per answer token of learned, healed static"
    )
    print("and, in the first row, healed dense; then learned minus healed static with its 95 % interval.\n")
    print("| | tokens an arm | code | maths | general |\n|---|---|---|---|---|")
    tokens = {name: tokens_of(out / name) for name in ("full", "no-teacher", "no-distill", "stage-1", "both-stages")}
    tokens["both-stages"] += tokens["stage-1"]
    titles = {
        "full": "distill, stage 2, teacher",
        "no-teacher": "without the teacher",
        "no-distill": "without distill",
        "both-stages": "with stage 1",
    }
    for name, title in titles.items():
        result = evaluated(out / name, given.source, given.limit, name == "full")
        print(line(title, tokens[name], result), flush=True)


if __name__ == "__main__":
    main()
