"""Bad input to `ifprune evaluate`."""

from __future__ import annotations

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table

TABLE = Table()
case = TABLE.case


@case
def no_tokens_for_a_question(at: Place) -> Bad:
    arguments = ["evaluate", "--model", at.sound, "--exact", "x=x.jsonl", "--max-tokens", "0"]
    return Bad(arguments, ("--max-tokens", "--help"), code=2)


@case
def question_with_gold_out_of_range(at: Place) -> Bad:
    file = at / "questions.jsonl"
    file.write_text(
        '{"query": "q", "choices": ["a", "b"], "gold": 0}\n{"query": "q", "choices": ["a", "b"], "gold": 2}\n'
    )
    words = (f"{file}, line 2", "gold is no index of its 2 options", "expected query, choices and gold")
    return Bad(["evaluate", "--model", at.sound, "--choices", f"x={file}"], words)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
