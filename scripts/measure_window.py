"""What does the predictor's window of 256 tokens cost: answers under its selections and the whole instruction's.

    python -m scripts.measure_window                       the embedded default, minutes
    python -m scripts.measure_window --model CHECKPOINT

Prompts are long because they begin with examples, as few-shot prompts do: other held-out questions with their answers
(`scripts/held_out`), of the same domain as the question, or of the two other domains, and the question comes last. All
rows read the same tokens and are measured on the same answers; they differ in which part of the text selects. Prints
losses (nats per token of the answer) with paired intervals, and how many of the active neurons differ.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_convert.embedded import ensure_embedded
from ifprune_mlx import Model, Selection, load, make_selector
from ifprune_mlx.data.dataset import Record, read_records
from ifprune_mlx.data.tokenize import Example, encode
from ifprune_mlx.eval.losses import compare
from ifprune_mlx.eval.metrics import POOLED
from ifprune_mlx.selection.predictor import SELECT_WINDOW
from ifprune_mlx.selection.selectors import Instruction

HELD_OUT = Path(__file__).parent / "held_out"
DOMAINS = ("code", "maths", "general")
SAME, OTHER = "same domain", "other domains"
WINDOW, WHOLE, QUESTION = f"window of {SELECT_WINDOW}", "whole instruction", "question alone"
LONGEST = 4096


def long_prompts(tokenizer: TokenizerWrapper, kind: str, count: int, tokens: int) -> list[tuple[Example, str]]:
    """`count` questions of each domain behind at least `tokens` of examples, and each question by itself."""
    held_out = {domain: read_records(HELD_OUT / f"{domain}.jsonl", domain) for domain in DOMAINS}
    generator = np.random.default_rng(0)
    found = []
    for domain in DOMAINS:
        sources = [domain] if kind == SAME else [name for name in DOMAINS if name != domain]
        for record in held_out[domain][:count]:
            text = ""
            while len(tokenizer.encode(text)) < tokens:
                examples = held_out[sources[int(generator.integers(len(sources)))]][count:]
                example = examples[int(generator.integers(len(examples)))]
                text += f"Question: {example.instruction}\nAnswer: {example.messages[-1]['content']}\n\n"
            text += f"Question: {record.instruction}"
            messages = ({"role": "user", "content": text}, record.messages[-1])
            encoded = encode(tokenizer, Record(messages, kind), LONGEST)
            assert encoded is not None
            found.append((encoded, record.instruction))
    return found


def differing(model: Model, prompts: list[Example], keep: tuple[int, ...], window: int) -> list[float]:
    """For every prompt, the share of the active neurons that the whole instruction does not select."""
    predictor, selector = model.predictor, make_selector(model, "learned")
    assert predictor is not None

    def selected(tokens: int, prompt: Example) -> Selection:
        predictor.window = tokens
        return selector.select(Instruction(prompt.instruction, (1,)), keep).selection

    return [1 - selected(LONGEST, prompt).overlap(selected(window, prompt)) for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint with a predictor; the embedded default if not given")
    parser.add_argument("--density", type=float, help="the checkpoint's own if not given")
    parser.add_argument("--questions", type=int, default=4, help="of each domain and kind of prompt; 4 make 24 prompts")
    parser.add_argument("--tokens", type=int, default=400, help="of examples before the question, at least")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model or ensure_embedded(print, lambda *_: None))
    predictor, keep = model.predictor, model.keep(arguments.density)
    if predictor is None:
        raise SystemExit(f"{arguments.model} has no predictor; give a checkpoint that has one")
    made = {kind: long_prompts(tokenizer, kind, arguments.questions, arguments.tokens) for kind in (SAME, OTHER)}
    prompts = {kind: [prompt for prompt, _ in pairs] for kind, pairs in made.items()}
    questions = {kind: [replace(prompt, instruction=text) for prompt, text in pairs] for kind, pairs in made.items()}

    predictor.window = SELECT_WINDOW
    found = compare(model, prompts, ("dense", "static", "learned"), keep)
    found = found.with_rows(compare(model, questions, ("learned",), keep), {QUESTION: "learned"})
    predictor.window = LONGEST
    found = found.with_rows(compare(model, prompts, ("learned",), keep), {WHOLE: "learned"})

    shares = {kind: differing(model, prompts[kind], keep, SELECT_WINDOW) for kind in prompts}
    lengths = [prompt.prompt_length for kind in prompts for prompt in prompts[kind]]
    print(
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens (median {np.median(lengths):.0f}), "
        f"density {found.density:.3f}\n"
    )
    print(f"| selected by | {SAME} | {OTHER} | both |\n|---|---|---|---|")
    names = {"dense": "(dense)", "static": "(static)", "learned": WINDOW}
    for row in found.selectors:
        cells = [f"{found.nll(row, domain):.4f}" for domain in (SAME, OTHER, POOLED)]
        print(f"| {names.get(row, row)} | {' | '.join(cells)} |")
    print(f"\n| difference | {SAME} | {OTHER} | both |\n|---|---|---|---|")
    for a, b in (("learned", WHOLE), ("learned", QUESTION), ("learned", "static")):
        cells = []
        for domain in (SAME, OTHER, POOLED):
            difference = found.difference(a, b, domain)
            assert difference is not None
            cells.append(f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]")
        print(f"| {names.get(a, a)} - {names.get(b, b)} | {' | '.join(cells)} |")
    each = [f"{np.mean(values):.3f} (most {max(values):.3f})" for values in shares.values()]
    print(f"| neurons of the window that the whole does not select | {' | '.join(each)} | |")
    print(json.dumps({**found.to_dict(), "neurons_that_differ": shares, "prompt_tokens": lengths}))


if __name__ == "__main__":
    main()
