"""Turns public data sets, as their authors publish them, into chats of three domains: code, maths, general.

    python scripts/make_training_data.py --data DATA_FOLDER --out FOLDER

Writes code.jsonl, maths.jsonl and general.jsonl (training), and code-test.jsonl, maths-test.jsonl (splits that their
authors hold out: MBPP tasks 11 to 510, GSM8K test). General has none: `ifprune_mlx.train.records.split` makes one.
Only data whose licence allows training shipped weights is read: MIT, Apache-2.0, CC-BY, CC-BY-SA.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

Chat = tuple[str, str]
LONGEST_PROMPT, LONGEST_ANSWER = 1200, 1600


def lines(file: Path) -> list[dict]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def joined(record: dict, answer: str) -> Chat:
    """An instruction with its input, and the answer."""
    return f"{record['instruction']}\n{record.get('input') or ''}".strip(), record[answer]


def code(data: Path) -> Iterator[Chat]:
    """GPTeacher codegen (MIT), MBPP outside its test split (CC-BY-4.0), Exercism (MIT)."""
    for record in json.loads((data / "gpteacher/codegen-instruct.json").read_text(encoding="utf-8")):
        yield joined(record, "response")
    for record in lines(data / "mbpp/mbpp.jsonl"):
        if not 11 <= record["task_id"] <= 510:
            yield mbpp(record)
    for record in lines(data / "exercism/exercism.jsonl"):
        yield f"Solve this in {record['lang']}.\n\n{record['instruction'].strip()}", record["solution"]


def mbpp(record: dict) -> Chat:
    """One MBPP task."""
    return record["text"], record["code"].replace("\r\n", "\n")


def maths(data: Path) -> Iterator[Chat]:
    """GSM8K train (MIT), MATH without MATH-500 (MIT), AQuA-RAT train (Apache-2.0)."""
    for record in lines(data / "gsm8k/train.jsonl"):
        yield gsm8k(record)
    for record in lines(data / "math/math_train_4500.jsonl"):
        yield record["problem"], record["solution"]
    for record in json.loads((data / "aqua_rat/aqua_train.json").read_text(encoding="utf-8")):
        prompt, answer = joined(record, "output")
        yield prompt.replace("\\n", "\n"), answer.replace("\\n", "\n")


def gsm8k(record: dict) -> Chat:
    """One GSM8K problem, without the calculator's marks."""
    return record["question"], re.sub(r"<<.*?>>", "", record["answer"])


def general(data: Path) -> Iterator[Chat]:
    """OASST1 in English (Apache-2.0), Dolly/HH (CC-BY-SA), instruction-data and seed tasks (Apache-2.0)."""
    for record in lines(data / "oasst_valid/oasst1_valid_953.jsonl"):
        if record["lang"] == "en":
            yield record["input"].removeprefix("### Human:").split("### Assistant")[0].strip(), record["output"]
    for record in lines(data / "dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl"):
        prompt = record["prompt"].split("### Instruction:\n")[-1].split("\n\n### Response")[0]
        yield prompt, record["response"]
    for record in json.loads((data / "raschka/instruction-data.json").read_text(encoding="utf-8")):
        yield joined(record, "output")
    for record in lines(data / "self_instruct/seed_tasks.jsonl"):
        instance = record["instances"][0]
        yield f"{record['instruction']}\n{instance['input']}".strip(), instance["output"]


def write(file: Path, chats: Iterator[Chat]) -> None:
    """Write chats that are neither empty nor too long, each prompt once."""
    seen: set[str] = set()
    with file.open("w", encoding="utf-8") as out:
        for prompt, answer in ((given.strip(), wanted.strip()) for given, wanted in chats):
            fits = 0 < len(prompt) <= LONGEST_PROMPT and 0 < len(answer) <= LONGEST_ANSWER
            if not fits or prompt in seen:
                continue
            seen.add(prompt)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{file}: {len(seen)} chats")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write(out / "code.jsonl", code(data))
    write(out / "maths.jsonl", maths(data))
    write(out / "general.jsonl", general(data))
    held_out = (record for record in lines(data / "mbpp/mbpp.jsonl") if 11 <= record["task_id"] <= 510)
    write(out / "code-test.jsonl", (mbpp(record) for record in held_out))
    write(out / "maths-test.jsonl", (gsm8k(record) for record in lines(data / "gsm8k/test.jsonl")))


if __name__ == "__main__":
    main()
