"""Writes the prompts that ship with the package: code, maths and general in turn, each domain's sources in turn.

    python scripts/make_shipped_prompts.py --data DATA_FOLDER --out ifprune_mlx/data/prompts.jsonl

Sources and licences stand in ifprune_mlx/data/PROMPTS.md: MIT, Apache-2.0, BSD, CC-BY and ODC-By; nothing that is
share-alike, nothing of T0, whose texts keep terms of their own, and nothing of GPTeacher, which GPT-4 wrote. Left out
are prompts of scripts/held_out and of the calibration chats, and what shares anything with scripts/held_out/unseen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain, islice, zip_longest
from pathlib import Path

from check_leakage import HeldOut, TrainingData
from make_training_data import Chat, evals, flan, joined, key, lines, plain, record_of, some, translation
from make_training_sources import HELD_OUT, code, maths

from ifprune_mlx.data.dataset import Record, read_records
from ifprune_mlx.data.jsonl import checked_text

CALIBRATION = Path(__file__).parents[1] / "convert" / "ifprune_convert" / "data" / "calibration.jsonl"
SHORTEST, LONGEST, OF_A_DOMAIN = 12, 700, 1200


def general(data: TrainingData) -> dict[str, Iterable[Chat]]:
    """By source; those of make_training_sources that are permissive, and OASST1 in every language."""
    asked = [
        (record["lang"], record["input"].removeprefix("### Human:").split("### Assistant")[0].strip(), record["output"])
        for record in lines(data / "oasst_valid/oasst1_valid_953.jsonl")
    ]
    instructions = json.loads((data / "raschka/instruction-data.json").read_text(encoding="utf-8"))
    seeds = lines(data / "self_instruct/seed_tasks.jsonl")
    reasoning: list[Chat] = []
    for name in ("creak", "ecqa", "qasc", "sensemaking", "strategyqa"):
        records = json.loads((data / f"flan_cot/{name}_train.json").read_text(encoding="utf-8"))
        reasoning += some(((plain(prompt), plain(answer)) for prompt, answer in map(flan, records)), 100)
    abstracts = lines(data / "scitldr/scitldr_a_train.jsonl")
    return {
        "assistant": [(prompt, answer) for language, prompt, answer in asked if language == "en"],
        "languages": [(prompt, answer) for language, prompt, answer in asked if language != "en"],
        "instructions": [joined(record, "output") for record in instructions],
        "seeds": [
            (f"{r['instruction']}\n{r['instances'][0]['input']}".strip(), r["instances"][0]["output"]) for r in seeds
        ],
        "reasoning": reasoning,
        "evals": chain.from_iterable(evals(data)),
        "translation": map(translation, lines(data / "tldr/tldr_parallel.jsonl")),
        # The first sentences alone: whole abstracts are too long.
        "summaries": ((f"Summarise in one sentence:\n{' '.join(r['source'][:4])}", r["target"][0]) for r in abstracts),
    }


def usable(chats: Iterable[Chat], seen: set[str], unseen: HeldOut) -> list[str]:
    """Prompts of a fitting length that nobody holds out, each once, in an order of no meaning: not that of their keys,
    whose lowest `data.dataset.split` holds out."""
    found: dict[str, str] = {}
    for text, _ in chats:
        prompt = text.strip()
        if SHORTEST <= len(prompt) <= LONGEST and checked_text(prompt, "prompt") and key(prompt) not in seen:
            found.setdefault(key(prompt), prompt)
    seen.update(found)
    order = sorted(found, key=lambda name: sha256(f"shipped/{name}".encode()).digest())
    return [found[name] for name in order if unseen.leak(record_of(found[name])) is None]


def in_turn(columns: Iterable[Iterable[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """The first of each, the second of each, and so on; of those that have one."""
    return (item for row in zip_longest(*columns) for item in row if item is not None)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, unseen = TrainingData(arguments.data), HeldOut.of_unseen_sources()
    known: list[Record] = [
        record for file in (*HELD_OUT.glob("*.jsonl"), CALIBRATION) for record in read_records(file, file.stem)
    ]
    seen = {record.key for record in known}
    domains: list[list[dict[str, str]]] = []
    programs = {name: chats for name, chats in code(data).items() if name != "codegen"}
    for domain, sources in {"code": programs, "maths": maths(data), "general": general(data)}.items():
        columns = [[(name, text) for text in usable(chats, seen, unseen)] for name, chats in sources.items()]
        chosen = list(islice(in_turn(columns), OF_A_DOMAIN))
        domains.append([{"domain": domain, "source": name, "prompt": text} for name, text in chosen])
        counts = {name: sum(name == source for source, _ in chosen) for name in sources}
        print(domain, len(chosen), counts)
    mixed = [line for row in zip(*domains, strict=True) for line in row]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in mixed)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.out}: {len(mixed)} prompts, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
