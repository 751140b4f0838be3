"""Turns public data sets, as their authors publish them, into chats of three domains: code, maths, general.

    python scripts/make_training_data.py --data DATA_FOLDER --out FOLDER

Writes code.jsonl, maths.jsonl and general.jsonl (training), and code-test.jsonl, maths-test.jsonl (splits that their
authors hold out: MBPP tasks 11 to 510, GSM8K test) and general-test.jsonl: those of general.jsonl that
`ifprune train --held-out 0.15` (the default) never trains on, without T0, whose texts keep terms of their own and are
not given on. `--sample N` keeps N chats of each test file (scripts/held_out holds 200).
Only data whose licence allows training shipped weights is read: MIT, Apache-2.0, BSD, CC-BY, CC-BY-SA, ODC-By.

Left out of the mix, from now on and for good, are the sources of scripts/held_out/unseen: APIBench (apibench), the
calls of Glaive (llamafactory), all of llm_foundry_eval (PIQA and others), all of redpajama_sample (Stack Exchange and
others), the advising queries of text2sql; and of what is not in DATA_FOLDER, TheAlgorithms/Python, TAL-SCQ5K and
ProofNet. A path in one of them is refused, and so is a chat that shares its prompt or 13 words in a row with those
sets, before its file is written (scripts/check_leakage.py).
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from check_leakage import HeldOut, TrainingData

from ifprune_mlx.data.dataset import Record, split

Chat = tuple[str, str]
LONGEST_PROMPT, LONGEST_ANSWER = 1200, 1600
# Shorter answers (labels, yes or no) show too little of what an instruction needs.
SHORTEST_ANSWER = 12
GENERAL_HELD_OUT = 0.15


def lines(file: Path) -> list[dict]:
    """The objects of a JSON lines file, packed or not."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


def joined(record: dict, answer: str) -> Chat:
    """An instruction with its input, and the answer."""
    return f"{record['instruction']}\n{record.get('input') or ''}".strip(), record[answer]


def some(chats: Iterable[Chat], count: int) -> list[Chat]:
    """`count` chats that fit, those whose hash comes first: the same ones whatever the order of the file."""
    fitting = [chat for chat in chats if len(chat[0]) <= LONGEST_PROMPT and len(chat[1].strip()) >= SHORTEST_ANSWER]
    return sorted(fitting, key=lambda chat: hashlib.sha256(chat[0].encode()).digest())[:count]


def plain(text: str) -> str:
    """Text whose line breaks were written as backslash n."""
    return text.replace("\\n", "\n")


def code(data: TrainingData) -> Iterator[Chat]:
    """GPTeacher codegen (MIT), MBPP outside its test split (CC-BY-4.0), Exercism (MIT), and up to 700 each of CodeI/O
    (Apache-2.0), nl2bash (MIT), tldr pages (CC-BY-4.0) and WikiSQL (BSD)."""
    for record in json.loads((data / "gpteacher/codegen-instruct.json").read_text(encoding="utf-8")):
        yield joined(record, "response")
    for record in lines(data / "mbpp/mbpp.jsonl"):
        if not 11 <= record["task_id"] <= 510:
            yield mbpp(record)
    for record in lines(data / "exercism/exercism.jsonl"):
        yield f"Solve this in {record['lang']}.\n\n{record['instruction'].strip()}", record["solution"]
    codeio = lines(data / "codeio/codeio_hq.jsonl.gz")
    yield from some(
        ((f"Write a Python program. {r['task_description'].strip()}", r["code_sample"]) for r in codeio), 700
    )
    shell = lines(data / "nl2bash/nl2bash.jsonl")
    yield from some(((f"Write a bash command. {r['nl']}", r["cmd"]) for r in shell), 700)
    pages = lines(data / "tldr/tldr_en.jsonl")
    yield from some(
        (
            (f"How do I use `{r['command']}` to do this? {r['task']}", re.sub(r"\{\{(.*?)\}\}", r"\1", r["cmd"]))
            for r in pages
        ),
        700,
    )
    groups = json.loads(bz2.decompress((data / "text2sql/wikisql.json.bz2").read_bytes()))
    yield from some((sql(group) for group in groups), 700)


def sql(group: dict) -> Chat:
    """A question to a table, and the query, with the names in place."""
    sentence, query = group["sentences"][0], group["sql"][0]
    text = sentence["text"]
    for name, value in sentence["variables"].items():
        text, query = text.replace(name, str(value)), query.replace(name, str(value))
    query = query.replace("TABLEalias0.", "").replace(" AS TABLEalias0", "").replace("_FIELD", "")
    return f"Write a SQL query that answers: {text.strip()}", query


def mbpp(record: dict) -> Chat:
    """One MBPP task."""
    return record["text"], record["code"].replace("\r\n", "\n")


def maths(data: TrainingData) -> Iterator[Chat]:
    """GSM8K train (MIT), MATH without MATH-500 (MIT), AQuA-RAT train (Apache-2.0)."""
    for record in lines(data / "gsm8k/train.jsonl"):
        yield gsm8k(record)
    for record in lines(data / "math/math_train_4500.jsonl"):
        yield record["problem"], record["solution"]
    for record in json.loads((data / "aqua_rat/aqua_train.json").read_text(encoding="utf-8")):
        prompt, answer = joined(record, "output")
        yield plain(prompt), plain(answer)


def gsm8k(record: dict) -> Chat:
    """One GSM8K problem, without the calculator's marks."""
    return record["question"], re.sub(r"<<.*?>>", "", record["answer"])


def general(data: TrainingData) -> Iterator[Chat]:
    """OASST1 in English (Apache-2.0), Dolly/HH (CC-BY-SA), instruction-data and seed tasks (Apache-2.0), GPTeacher's
    roleplay (MIT), and samples of OpenAI's evals (MIT), FLAN-CoT (ODC-By), BoolQ and OpenBookQA (ODC-By), SciTLDR
    (Apache-2.0), wiki-split (CC-BY-SA) and tldr in other languages (CC-BY-4.0)."""
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
    roleplay = data / "gpteacher/roleplay-simple-deduped-roleplay-instruct.json"
    for record in json.loads(roleplay.read_text(encoding="utf-8")):
        yield joined(record, "response")
    yield from chain.from_iterable(evals(data))
    for name in ("creak", "ecqa", "qasc", "sensemaking", "strategyqa"):
        records = json.loads((data / f"flan_cot/{name}_train.json").read_text(encoding="utf-8"))
        yield from some(((plain(prompt), plain(answer)) for prompt, answer in map(flan, records)), 250)
    for name in ("boolq", "openbookqa"):
        records = json.loads((data / f"commonsense/{name}_train.json").read_text(encoding="utf-8"))
        yield from some(map(flan, records), 100)
    abstracts = lines(data / "scitldr/scitldr_a_train.jsonl")
    yield from some(((f"Summarise in one sentence:\n{' '.join(r['source'])}", r["target"][0]) for r in abstracts), 300)
    rows = [line.split("\t") for line in (data / "wiki_split/validation.tsv").read_text(encoding="utf-8").splitlines()]
    yield from some(
        ((f"Split into two sentences:\n{long}", short.replace(" <::::> ", "\n")) for long, short in rows), 200
    )
    yield from some(map(translation, lines(data / "tldr/tldr_parallel.jsonl")), 300)


def flan(record: dict) -> Chat:
    """A record in the instruction, input, output form."""
    return joined(record, "output")


def t0(data: TrainingData) -> Iterator[list[Chat]]:
    """Up to 15 chats of every template but samsum's, which may not be used commercially."""
    templates: dict[str, list[Chat]] = {}
    for record in lines(data / "t0_p3/t0_sample.jsonl.gz"):
        if not record["template"].startswith("samsum"):
            templates.setdefault(record["template"], []).append((record["prompt"], record["completion"]))
    return (some(chats, 15) for chats in templates.values())


def evals(data: TrainingData) -> Iterator[list[Chat]]:
    """Up to 15 chats of every eval, its system message before the question."""
    found: dict[str, list[Chat]] = {}
    for record in lines(data / "openai_evals/openai_evals_sample.jsonl.gz"):
        texts = [message["content"] for message in record["messages"]]
        roles = [message["role"] for message in record["messages"]]
        if roles in (["user"], ["system", "user"]) and isinstance(record["ideal"], str):
            found.setdefault(record["eval"], []).append(("\n\n".join(texts), record["ideal"]))
    return (some(chats, 15) for chats in found.values())


def translation(record: dict) -> Chat:
    """A description of a command, into another language."""
    languages = {"es": "Spanish", "fr": "French", "de": "German", "it": "Italian", "pt_BR": "Portuguese", "nl": "Dutch"}
    return f"Translate into {languages[record['lang']]}: {record['en']}", record["tgt"]


def sample(chats: list[Chat], count: int | None) -> list[Chat]:
    """`count` chats, each prompt once, of at most 600 characters, and no one-word answers; all chats for None."""
    once = {chat[0].strip(): chat for chat in chats if len(chat[0]) <= 600}
    return chats if count is None else some(once.values(), count)


def record_of(prompt: str, *answers: str) -> Record:
    """A prompt, and its answer if given, as the trainer sees them."""
    texts = zip(("user", "assistant"), (prompt, *answers), strict=False)
    return Record(tuple({"role": role, "content": text.strip()} for role, text in texts))


def key(prompt: str) -> str:
    """What tells a prompt apart, whatever its case and spacing."""
    return record_of(prompt).key


def held_out(prompt: str) -> bool:
    """Whether a general prompt is kept for the test."""
    return split(record_of(prompt), GENERAL_HELD_OUT) == "valid"


def write(file: Path, chats: Iterable[Chat], held_out: HeldOut | None = None) -> None:
    """Write chats that are neither empty nor too long, each prompt once; LeakageError if one is held out."""
    records: dict[str, Record] = {}
    for prompt, answer in ((given.strip(), wanted.strip()) for given, wanted in chats):
        if 0 < len(prompt) <= LONGEST_PROMPT and 0 < len(answer) <= LONGEST_ANSWER:
            records.setdefault(prompt, record_of(prompt, answer))
    if held_out is not None:
        held_out.check(records.values(), file.name)
    with file.open("w", encoding="utf-8") as out:
        for record in records.values():
            out.write(json.dumps({"messages": record.messages}, ensure_ascii=False) + "\n")
    print(f"{file}: {len(records)} chats")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample", type=int, help="chats of each test file; all if not given")
    arguments = parser.parse_args()
    data, out = TrainingData(arguments.data), arguments.out
    unseen = HeldOut.of_unseen_sources()
    out.mkdir(parents=True, exist_ok=True)
    mixed = list(general(data))
    write(out / "general.jsonl", chain(mixed, *t0(data)), unseen)
    tasks = [mbpp(record) for record in lines(data / "mbpp/mbpp.jsonl") if 11 <= record["task_id"] <= 510]
    problems = [gsm8k(record) for record in lines(data / "gsm8k/test.jsonl")]
    # MBPP repeats a text of its test split outside it.
    tested = {key(prompt) for prompt, _ in (*tasks, *problems)}
    write(out / "code.jsonl", (chat for chat in code(data) if key(chat[0]) not in tested), unseen)
    write(out / "maths.jsonl", (chat for chat in maths(data) if key(chat[0]) not in tested), unseen)
    test = [chat for chat in mixed if held_out(chat[0])]
    write(out / "general-test.jsonl", sample(test, arguments.sample))
    write(out / "code-test.jsonl", sample(tasks, arguments.sample))
    write(out / "maths-test.jsonl", sample(problems, arguments.sample))


if __name__ == "__main__":
    main()
