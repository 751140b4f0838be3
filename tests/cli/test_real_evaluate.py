"""Tasks on the real SmolLM2 as published: it knows what everyone knows, and scores are those of a plain loop."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import load
from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.eval.multiple_choice import encode_choices, option_scores, read_choices
from tests.cli.process import run_here

pytestmark = pytest.mark.real

# In whole sentences, as it answers.
CHOICES = [
    ("What is the capital of France?", ["The capital of France is Madrid.", "The capital of France is Paris."], 1),
    ("What do cows drink when they are thirsty?", ["Cows drink water.", "Cows drink gravel."], 0),
    ("Which animal barks?", ["The fish barks.", "The snail barks.", "The dog barks."], 2),
    ("What falls from the sky when it rains?", ["Shoes fall from the sky.", "Water falls from the sky."], 1),
    ("When does the sun rise?", ["The sun rises in the morning.", "The sun rises in the sandwich."], 0),
]
SUMS = [("What is 2 + 3?", 5), ("What is 10 - 4?", 6), ("How many days are there in a week?", 7)]


def test_easy_questions(smollm2_base: Path, tmp_path: Path) -> None:
    choices, exact = tmp_path / "choices.jsonl", tmp_path / "exact.jsonl"
    values = [{"query": query, "choices": options, "gold": gold} for query, options, gold in CHOICES]
    choices.write_text("\n".join(map(json.dumps, values)))
    exact.write_text("\n".join(json.dumps({"question": question, "answer": number}) for question, number in SUMS))
    arguments = ["--choices", f"easy={choices}", "--exact", f"sums={exact}", "--max-tokens", "24", "--json", "-"]
    selectors = ["--selectors", "dense,random", "--density", "0.5"]
    done = run_here("evaluate", "--model", smollm2_base, *arguments, *selectors)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["tasks"]
    value = {(row["selector"], row["task"], row["metric"]): row["value"] for row in rows}
    assert value["dense", "easy", "accuracy"] == 1
    assert value["dense", "sums", "accuracy"] >= 2 / 3
    # Arbitrary halves of its neurons know nothing.
    assert value["random", "sums", "accuracy"] == 0
    assert value["dense", "easy", "margin"] > value["random", "easy", "margin"]


def test_scores_equal_a_plain_loop(smollm2_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    begins = ["The cup did not fit the box as the cup", "The cup did not fit the box as the box"]
    values = [
        {"query": CHOICES[0][0], "choices": CHOICES[0][1], "gold": 1},
        {"context_options": begins, "continuation": "was too small.", "gold": 1},
    ]
    file.write_text("\n".join(map(json.dumps, values)))
    model, tokenizer = load(smollm2_base)
    for question in read_choices(file):
        found = option_scores(model, encode_choices(tokenizer, question))
        prompt = render_messages(tokenizer, [{"role": "user", "content": question.prompt}])
        for (lead, scored), score in zip(question.answers, found, strict=True):
            tail = tokenizer.encode(f" {scored}" if lead else scored, add_special_tokens=False)
            head = [*prompt, *tokenizer.encode(lead, add_special_tokens=False)]
            logits = np.array(model(mx.array([head + tail]))[0].astype(mx.float32)).astype(np.float64)
            total = 0.0
            for index, token in enumerate(tail):
                row = logits[len(head) + index - 1]
                total += row[token] - np.log(np.exp(row).sum())
            # MLX's float32 logsumexp over 49,152 logits is off by up to 2e-4.
            assert score == pytest.approx(total / len(tail), abs=5e-4)
    model.close()
