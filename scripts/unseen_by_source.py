"""Prints the losses of `evaluate_default.py --sets unseen --out FOLDER` source by source, with intervals.

python scripts/unseen_by_source.py FOLDER/quality.json...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from check_leakage import UNSEEN

from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.eval.metrics import paired_differences

# Chats of each source, in the order of the files (scripts/held_out/unseen/README.md).
SOURCES = {
    "code": {"functions": 110, "TensorFlow Hub": 80, "SQL": 60},
    "maths": {"competitions": 150, "proofs": 100},
    "general": {"Macs": 110, "household": 80, "assistant": 60},
}
ROWS = ("learned", "healed-static", "mismatched", "dense", "published")
PAIRS = (("learned", "healed-static"), ("learned", "mismatched"))


def source_of(domain: str) -> dict[str, str]:
    """The source of every prompt of a domain, by its key."""
    keys = [record.key for record in read_records(UNSEEN / f"{domain}.jsonl", domain)]
    names = [name for name, count in SOURCES[domain].items() for _ in range(count)]
    return dict(zip(keys, names, strict=True))


def lines(point: dict[str, Any]) -> Iterator[str]:
    """A line for each source of one density's evaluation."""
    for title, keys in point["prompts"].items():
        domain = title.split()[-1]
        sources = source_of(domain)
        rows = {row["selector"]: row["per_prompt"] for row in point["rows"] if row["domain"] == title}
        for name in SOURCES[domain]:
            places = [index for index, key in enumerate(keys) if sources[key] == name]
            losses = {row: [rows[row][place] for place in places] for row in ROWS}
            means = "".join(f"{sum(values) / len(values):9.3f}" for values in losses.values())
            found = {(each.a, each.b): each for each in paired_differences({name: losses})}
            gaps = (found[pair] for pair in PAIRS)
            shown = "".join(f"   {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]" for gap in gaps)
            yield f"{point['density']:.2f} {domain:8}{name:16}{len(places):4}{means}{shown}"


def main() -> None:
    """Print every file's sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    pairs = "".join(f"   {f'{a} - {b}':>23}" for a, b in PAIRS)
    print(f"{'':5}{'domain':8}{'source':16}{'n':>4}{''.join(f'{row[:8]:>9}' for row in ROWS)}{pairs}")
    for file in parser.parse_args().files:
        for point in json.loads(file.read_text(encoding="utf-8"))["curve"]:
            print("\n".join(lines(point)))


if __name__ == "__main__":
    main()
