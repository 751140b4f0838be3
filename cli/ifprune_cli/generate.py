"""`ifprune generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .console import note, progress, report, result_json
from .loading import open_runtime
from .options import (
    Budget,
    JsonOption,
    ModelOptions,
    Sampling,
    Selecting,
    SelectionOptions,
    SystemPromptOption,
)
from .options import check_exclusive as check_exclusive  # noqa: PLC0414 (export and serve import it from here)

PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="The instruction. With -, it is read from stdin.")]


def generate(
    prompt: PromptOption,
    model: ModelOptions,
    choice: SelectionOptions,
    budget: Budget,
    selecting: Selecting,
    sampling: Sampling,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Generate at most this many tokens.")] = 256,
    system_prompt: SystemPromptOption = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Take the prompt as it is.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Answer one prompt on the neurons that it selects."""
    text = read_prompt(prompt)
    choice.check_exclusive(budget)
    from ifprune_mlx import stream_generate

    runtime = open_runtime(model, choice, budget, selecting, sampling)
    said, stats = "", None
    with progress("prefill", "tokens") as update:
        for response in stream_generate(
            runtime.model,
            runtime.tokenizer,
            text if ignore_chat_template else as_messages(text, system_prompt),
            max_tokens=max_tokens,
            instruction=text,
            progress=update,
            **runtime.arguments,
        ):
            said += response.text
            stats = response.stats
            if not json:
                sys.stdout.write(response.text)
                sys.stdout.flush()
    if stats is None:
        return
    if json:
        result_json({"text": said, **asdict(stats)})
    else:
        print()
        note(report(stats))


def read_prompt(prompt: str, option: str = "--prompt") -> str:
    """The prompt that `option` gives, from stdin if it is `-`.

    Raises:
        PromptError: if stdin is not UTF-8 text, or the prompt is empty.
    """
    from ifprune_mlx import PromptError

    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as exc:
            raise PromptError(f"stdin, byte {exc.start}: not UTF-8 text; convert it, for example with iconv") from None
    if not prompt.strip():
        raise PromptError("the prompt is empty; write something to answer")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that were not UTF-8
        raise PromptError(f"{option} is not UTF-8 text; convert it, or pass it through stdin with {option} -") from None
    return prompt


def as_messages(text: str, system_prompt: str | None) -> list[dict[str, Any]]:
    """One user message, after the system prompt if there is one."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]
