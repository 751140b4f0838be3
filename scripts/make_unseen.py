"""Writes the held-out sets of unseen sources, scripts/held_out/unseen: 250 chats each of code, maths and general.

    python scripts/make_unseen.py --data DATA_FOLDER --checkouts FOLDER --not-in MIX/code.jsonl ... --out FOLDER

FOLDER holds checkouts named TheAlgorithms (TheAlgorithms/Python), TAL-SCQ5K (math-eval/TAL-SCQ5K) and ProofNet
(zhangir-azerbayev/ProofNet). Chats that share a prompt or 13 words in a row with a file of `--not-in` are left out:
give the training mix and the held-out sets of seen sources. scripts/check_leakage.py keeps training runs off all this.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from check_leakage import HeldOut
from make_training_data import Chat, lines, record_of, some, write

from ifprune_mlx.data.dataset import read_records

# Tokens past 192 of a chat are not read when it is measured.
LONGEST_PROMPT, LONGEST_ANSWER, SHORTEST_ANSWER = 420, 800, 20


def functions(checkouts: Path) -> Iterator[Chat]:
    """Complete a Python function from its signature and docstring: the shortest function of every file."""
    for file in sorted((checkouts / "TheAlgorithms").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        try:
            nodes = ast.parse(text).body
        except SyntaxError:  # generics in the syntax of Python 3.12
            continue
        found = []
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                rows = text.split("\n")
                start, end = node.body[0].end_lineno, node.end_lineno
                assert start is not None
                given, body = rows[node.lineno - 1 : start], "\n".join(rows[start:end]).strip("\n")
                signature = "\n".join(rows[node.lineno - 1 : node.body[0].lineno - 1])
                found.append(("\n".join(["Complete this Python function.", "", *given]), f"{signature}\n{body}"))
        yield from sorted((chat for chat in found if fits(chat)), key=lambda chat: len(chat[0]))[:1]


def apis(data: Path) -> Iterator[Chat]:
    """Which model of TensorFlow Hub does this, and how is it called?"""
    pattern = r"###Instruction:\s*(.*?)\n###Output:.*?<<<explanation>>>:\s*(.*?)\s*<<<code>>>:\s*(.*)"
    for record in lines(data / "apibench/tensorflow_eval.json"):
        if match := re.match(pattern, record["code"], re.DOTALL):
            asked, told, program = (part.strip() for part in match.groups())
            if "###" not in asked:
                yield asked, f"{told.rstrip(',')}\n\n```python\n{program}\n```"


def advising(data: Path) -> Iterator[Chat]:
    """A question about a university's courses, as SQL: one wording of every query."""
    for group in json.loads((data / "text2sql/advising.json").read_text(encoding="utf-8")):
        question, query = sql(group, re.sub(r"alias\d+", "", re.sub(r" AS \w+alias\d+", "", group["sql"][0])))
        if '""' not in query and "=  ;" not in query:
            yield f"{question} Answer with a query to the university's SQL database.", query


def sql(group: dict, query: str) -> Chat:
    """A question and its query, with the names in place."""
    # Wordings differ in length and form; this takes one of all of them, evenly over the groups.
    sentence = group["sentences"][len(query) % len(group["sentences"])]
    text = sentence["text"]
    for name, value in sentence["variables"].items():
        text, query = re.sub(rf"\b{name}\b", str(value), text), re.sub(rf"\b{name}\b", str(value), query)
    return re.sub(r" ([?.,])", r"\1", text).strip(), query


def competitions(checkouts: Path) -> Iterator[Chat]:
    """Multiple choice from mathematical competitions for pupils, and how it is solved."""
    for part in ("train_3K", "test_2K"):
        for record in lines(checkouts / f"TAL-SCQ5K/en_single_choice_constructed_5K/en_single_choice_{part}.jsonl"):
            solution = " ".join(record["answer_analysis"] or [])
            options = [
                f"{option[0]['aoVal']}. {option[0]['content'].strip()}" for option in record["answer_option_list"]
            ]
            asked, told = (latex(text) for text in ("\n".join([record["problem"].strip(), *options]), solution))
            if asked.isascii() and told.isascii():
                yield asked, told


def latex(text: str) -> str:
    """Without marks of the typesetting that nobody types."""
    text = text.replace("$$", "$").replace("\\textquotesingle ", "'").replace("\\textbackslash", "")
    text = text.replace("$\\textasciitilde$", " ").replace("~", " ")
    return re.sub(r"[ \u3000]+", " ", text).strip()


def proofs(checkouts: Path) -> Iterator[Chat]:
    """Exercises of undergraduate textbooks, and their proofs."""
    for part in ("valid", "test"):
        for record in lines(checkouts / f"ProofNet/benchmark/{part}.jsonl"):
            proof = re.sub(r"\\(begin|end)\{proof\}", "", record["nl_proof"])
            yield record["nl_statement"], re.sub(r"\n\s*\n\s*", "\n", proof).strip()


def questions(data: Path) -> Iterator[Chat]:
    """What people asked about their Macs and telephones, and the first answer that is short enough."""
    for record in lines(data / "redpajama_sample/sample_stackexchange1.jsonl"):
        question, *answers = record["text"].removeprefix("Q: ").split("\n\nA: ")
        for answer in answers[:2]:
            if 60 <= len(answer) <= LONGEST_ANSWER and "Possible Duplicate" not in question:
                yield question, answer
                break


def household(data: Path) -> Iterator[Chat]:
    """How is a thing done at home? PIQA, with the right one of its two answers."""
    for record in lines(data / "llm_foundry_eval/piqa.jsonl"):
        goal = record["query"].removeprefix("Question: ").strip()
        yield (goal if goal.endswith("?") else f"How do I do this? {goal}"), record["choices"][record["gold"]]


def assistance(data: Path) -> Iterator[Chat]:
    """What an assistant with tools was asked first, where it answered without one."""
    for record in json.loads((data / "llamafactory/glaive_toolcall_en_demo.json").read_text(encoding="utf-8")):
        (asking, question), (answering, answer) = (tuple(turn.values()) for turn in record["conversations"][:2])
        if (asking, answering) == ("human", "gpt"):
            yield question, answer


def fits(chat: Chat) -> bool:
    """Whether 192 tokens hold the prompt and enough of the answer."""
    prompt, answer = (text.strip() for text in chat)
    return 8 <= len(prompt) <= LONGEST_PROMPT and SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkouts", type=Path, required=True)
    parser.add_argument("--not-in", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, checkouts = arguments.data, arguments.checkouts
    seen = HeldOut(record for file in arguments.not_in for record in read_records(file, file.stem))
    sources = {
        "code": [(functions(checkouts), 110), (apis(data), 80), (advising(data), 60)],
        "maths": [(competitions(checkouts), 150), (proofs(checkouts), 100)],
        "general": [(questions(data), 110), (household(data), 80), (assistance(data), 60)],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for domain, parts in sources.items():
        chats = []
        for source, count in parts:
            fresh = {chat[0].strip(): chat for chat in source if fits(chat) and seen.leak(record_of(*chat)) is None}
            chats += some(fresh.values(), count)
        write(arguments.out / f"{domain}.jsonl", chats)


if __name__ == "__main__":
    main()
