"""`ifprune demo`: three instructions, each answered by the whole model and on the neurons that it selects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import parameters, result_json, show
from .generate import answer, as_messages
from .loading import open_runtime
from .options import (
    Budget,
    DialOption,
    DtypeOption,
    IgnoreTemplateOption,
    JsonOption,
    ModelOption,
    ModelOptions,
    Selecting,
    SelectionOptions,
    SelectorOption,
)

if TYPE_CHECKING:
    from ifprune_mlx import Selection

# A model of 135M parameters can answer these: the shipped default does, dense and sliced, and ends by itself.
PROMPTS = (
    ("code", "Write a Python function that returns the length of a string."),
    ("facts", "What is the largest ocean on Earth?"),
    ("everyday", "Give one tip for sleeping better."),
)
# docs/performance.md, "Three sizes".
_LARGER = "a 9B model at 4 bit with 3B active reads 1.70 GB instead of 5.17 GB per token, 3.0 times less"


def demo(
    selecting: Selecting,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    selector: SelectorOption = None,
    density: DialOption = None,
    ignore_chat_template: IgnoreTemplateOption = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Generate at most this many tokens for each answer.")
    ] = 256,
    json: JsonOption = False,
) -> None:
    """Answer three instructions with all neurons and with the selected ones, and compare the speed."""
    loaded, choice, template = ModelOptions(model, dtype), SelectionOptions(selector), not ignore_chat_template
    runtime = open_runtime(loaded, choice, Budget(density), selecting, template=template)
    answers: list[dict[str, Any]] = []
    before: Selection | None = None
    answer(runtime, PROMPTS[0][1], max_tokens=2, dense=True)  # the first tokens of a process are slow
    for domain, prompt in PROMPTS:
        row: dict[str, Any] = {"domain": domain, "prompt": prompt}
        if not json:
            show(f"> {prompt}\n")
        for kind in ("dense", "sliced"):
            if not json:
                show(f"{kind}:")
            messages, dense = as_messages(prompt, None), kind == "dense"
            text, stats = answer(runtime, messages, streams=not json, max_tokens=max_tokens, dense=dense)
            row[kind] = {"text": text, **asdict(stats)}
            if (selection := runtime.model.selection) is not None:
                row[kind]["overlap"] = None if before is None else selection.overlap(before)
                before = selection
            if not json:
                show(f"\n[{_figures(kind, row[kind])}]\n")
        answers.append(row)
    gain = _gain(answers)
    if json:
        result_json({"answers": answers, **gain})
        return
    show(
        f"Here: {gain['tokens_per_s_ratio']:.2f} times the tokens/s (`ifprune bench` measures it with more care), with "
        f"{parameters(gain['active_parameters'])} of {parameters(gain['total_parameters'])} parameters active. "
        f"By arithmetic, {_LARGER}."
    )


def _figures(kind: str, said: dict[str, Any]) -> str:
    """One answer's figures for people."""
    figures = [
        f"{parameters(said['active_parameters'])} parameters active",
        f"{said['completion_tokens']} tokens at {said['tokens_per_s']:.1f}/s",
    ]
    if kind == "sliced":
        figures.append(f"selected in {said['select_s'] + said['switch_s']:.2f} s")
    if said["overlap"] is not None:
        figures.append(f"{100 * said['overlap']:.0f} % of its neurons were selected before")
    if said["finish_reason"] == "length":
        figures.append("cut off by --max-tokens")
    return ", ".join(figures)


def _gain(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Decoding's speed over all answers, sliced against dense, and the parameters that took part."""

    def speed(kind: str) -> float:
        seconds: float = sum(row[kind]["decode_s"] for row in answers)
        tokens: int = sum(row[kind]["completion_tokens"] - 1 for row in answers)
        return tokens / max(seconds, 1e-9)

    dense, sliced = speed("dense"), speed("sliced")
    return {
        "dense_tokens_per_s": dense,
        "sliced_tokens_per_s": sliced,
        "tokens_per_s_ratio": sliced / dense if dense else 0.0,
        "active_parameters": answers[0]["sliced"]["active_parameters"],
        "total_parameters": answers[0]["sliced"]["total_parameters"],
    }
