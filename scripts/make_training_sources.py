"""Turns the same public data sets as make_training_data.py into chats, one file a source, and more of each.

    python scripts/make_training_sources.py --data DATA_FOLDER --out FOLDER
    ifprune train $(python scripts/make_training_sources.py --options FOLDER) ...

A predictor that is to serve prompts of sources it never saw should see many, and none of them mostly: `ifprune train`
draws from every `--data` alike, so each source is one. The general ones of T0 and of OpenAI's evals are made of
hundreds of tasks, with the same few chats of each. Prompts that scripts/held_out holds are left out, and what shares
anything with scripts/held_out/unseen is refused.

    code-*      the languages of Exercism, GPTeacher's codegen, MBPP, CodeI/O, nl2bash, tldr pages, WikiSQL
    maths-*     GSM8K, the seven subjects of MATH, AQuA-RAT
    general-*   OASST1, Dolly/HH, instruction-data and seed tasks, roleplay, evals, T0, FLAN-CoT with BoolQ and
                OpenBookQA, summaries, rewriting, translation
"""

from __future__ import annotations

import argparse
import bz2
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from check_leakage import HeldOut, TrainingData
from make_training_data import Chat, evals, flan, general, gsm8k, joined, key, lines, mbpp, plain, some, sql, t0, write

from ifprune_mlx.data.dataset import read_records

HELD_OUT = Path(__file__).parent / "held_out"
MOST = 3000


def code(data: TrainingData) -> dict[str, Iterable[Chat]]:
    """By source, see above."""
    by_language: dict[str, list[Chat]] = defaultdict(list)
    for record in lines(data / "exercism/exercism.jsonl"):
        chat = f"Solve this in {record['lang']}.\n\n{record['instruction'].strip()}", record["solution"]
        by_language[record["lang"]].append(chat)
    found: dict[str, Iterable[Chat]] = {"exercism": chain.from_iterable(by_language.values())}
    codegen = json.loads((data / "gpteacher/codegen-instruct.json").read_text(encoding="utf-8"))
    found["codegen"] = (joined(record, "response") for record in codegen)
    tasks = lines(data / "mbpp/mbpp.jsonl")
    found["mbpp"] = (mbpp(record) for record in tasks if not 11 <= record["task_id"] <= 510)
    programs = lines(data / "codeio/codeio_hq.jsonl.gz")
    found["codeio"] = (
        (f"Write a Python program. {record['task_description'].strip()}", record["code_sample"]) for record in programs
    )
    shell = lines(data / "nl2bash/nl2bash.jsonl")
    found["nl2bash"] = ((f"Write a bash command. {record['nl']}", record["cmd"]) for record in shell)
    pages = lines(data / "tldr/tldr_en.jsonl")
    found["tldr"] = (
        (f"How do I use `{r['command']}` to do this? {r['task']}", re.sub(r"\{\{(.*?)\}\}", r"\1", r["cmd"]))
        for r in pages
    )
    groups = json.loads(bz2.decompress((data / "text2sql/wikisql.json.bz2").read_bytes()))
    found["wikisql"] = map(sql, groups)
    return found


def maths(data: TrainingData) -> dict[str, Iterable[Chat]]:
    """By source, see above."""
    found: dict[str, Iterable[Chat]] = {"gsm8k": map(gsm8k, lines(data / "gsm8k/train.jsonl"))}
    subjects: dict[str, list[Chat]] = defaultdict(list)
    for record in lines(data / "math/math_train_4500.jsonl"):
        subjects[record["type"]].append((record["problem"], record["solution"]))
    found |= {re.sub(r"\W+", "-", name.lower()): chats for name, chats in subjects.items()}
    aqua = json.loads((data / "aqua_rat/aqua_train.json").read_text(encoding="utf-8"))
    found["aqua"] = ((plain(prompt), plain(answer)) for prompt, answer in (joined(r, "output") for r in aqua))
    return found


def others(data: TrainingData) -> dict[str, Iterable[Chat]]:
    """By source, see above; OASST1, Dolly, instruction-data and seed tasks are those of make_training_data."""
    mixed = list(general(data))
    marks = {
        "summaries": lambda prompt: prompt.startswith("Summarise in one sentence:"),
        "rewriting": lambda prompt: prompt.startswith("Split into two sentences:"),
        "translation": lambda prompt: prompt.startswith("Translate into "),
    }
    reasoning: list[Chat] = []
    for name in ("creak", "ecqa", "qasc", "sensemaking", "strategyqa"):
        records = json.loads((data / f"flan_cot/{name}_train.json").read_text(encoding="utf-8"))
        reasoning += some(((plain(prompt), plain(answer)) for prompt, answer in map(flan, records)), 600)
    for name in ("boolq", "openbookqa"):
        reasoning += some(
            map(flan, json.loads((data / f"commonsense/{name}_train.json").read_text(encoding="utf-8"))), 600
        )
    tests = list(chain.from_iterable(evals(data)))
    known = {prompt for prompt, _ in chain(reasoning, tests)}
    roleplay = json.loads(
        (data / "gpteacher/roleplay-simple-deduped-roleplay-instruct.json").read_text(encoding="utf-8")
    )
    played = [joined(record, "response") for record in roleplay]
    known |= {prompt for prompt, _ in played}
    found: dict[str, Iterable[Chat]] = {name: [c for c in mixed if is_it(c[0])] for name, is_it in marks.items()}
    known |= {prompt for chats in found.values() for prompt, _ in chats}
    flan_like = re.compile(r"(?s).*(Options:|true/false|answer format)", re.IGNORECASE)
    found["assistant"] = [chat for chat in mixed if chat[0] not in known and not flan_like.match(chat[0])]
    found |= {"reasoning": reasoning, "evals": tests, "roleplay": played, "t0": chain.from_iterable(t0(data))}
    return found


def main() -> None:
    """Write all files, or print the options that read them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--options", type=Path, metavar="FOLDER", help="print the --data options of a folder's files")
    arguments = parser.parse_args()
    if arguments.options is not None:
        print(" ".join(f"--data {file.stem}={file}" for file in sorted(arguments.options.glob("*.jsonl"))))
        return
    if arguments.data is None or arguments.out is None:
        parser.error("give --data and --out, or --options")
    data, unseen = TrainingData(arguments.data), HeldOut.of_unseen_sources()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tested = {record.key for file in HELD_OUT.glob("*.jsonl") for record in read_records(file, file.stem)}
    domains = {"code": code(data), "maths": maths(data), "general": others(data)}
    for domain, sources in domains.items():
        for name, chats in sources.items():
            fresh = some((chat for chat in chats if key(chat[0]) not in tested), MOST)
            write(arguments.out / f"{domain}-{name}.jsonl", fresh, unseen)


if __name__ == "__main__":
    main()
