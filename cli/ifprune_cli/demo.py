"""`ifprune demo`: three instructions, three selections, one model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .console import note, report, result_json
from .loading import load_model
from .options import (
    DensityOption,
    DtypeOption,
    ModelOption,
    Selecting,
    SelectionCacheOption,
    SelectorOption,
    SelectWindowOption,
)

PROMPTS = (
    ("code", "Write a Python function that reverses a string, and explain how it works."),
    ("maths", "A train travels 60 miles in 1.5 hours. What is its average speed? Explain step by step."),
    ("everyday", "How do I take care of a houseplant?"),
)


def demo(
    model: ModelOption = None,
    selector: SelectorOption = None,
    select_window: SelectWindowOption = None,
    selection_cache: SelectionCacheOption = None,
    density: DensityOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens of each answer.")] = 96,
    dtype: DtypeOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
) -> None:
    """Answer three instructions (code, maths, everyday), each on the neurons that it selects."""
    loaded, tokenizer = load_model(model, dtype, trust_remote_code=False)
    Selecting(select_window, selection_cache).apply(loaded)
    from ifprune_mlx import stream_generate

    results: list[dict[str, Any]] = []
    for domain, prompt in PROMPTS:
        if not json:
            print(f"\n{domain}> {prompt}\n")
        said = ""
        for response in stream_generate(
            loaded,
            tokenizer,
            [{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            selector=None if selector is None else selector.value,
            density=density,
        ):
            said += response.text
            if not json:
                sys.stdout.write(response.text)
                sys.stdout.flush()
            if response.stats is not None:
                results.append({"domain": domain, "prompt": prompt, "text": said, **asdict(response.stats)})
                if not json:
                    print()
                    sys.stdout.flush()
                    note(report(response.stats))
    if json:
        result_json({"answers": results})
