"""`ifprune generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import note, progress, report, result_json, show, show_answer
from .loading import Runtime, open_runtime
from .options import (
    Budget,
    IgnoreTemplateOption,
    JsonOption,
    ModelOptions,
    PromptArgument,
    PromptOption,
    Sampling,
    Selecting,
    SelectionOptions,
    SystemPromptOption,
    TemplateVariablesOption,
    given_prompt,
)
from .ranks import once

if TYPE_CHECKING:
    from ifprune_mlx import Stats
    from ifprune_mlx.chat_template import Prompt


def generate(
    model: ModelOptions,
    choice: SelectionOptions,
    budget: Budget,
    selecting: Selecting,
    sampling: Sampling,
    words: PromptArgument = None,
    prompt: PromptOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Generate at most this many tokens.")] = 256,
    system_prompt: SystemPromptOption = None,
    ignore_chat_template: IgnoreTemplateOption = False,
    json_schema: Annotated[
        Optional[Path], typer.Option("--json-schema", help="Answer with JSON that the JSON schema in this file allows.")
    ] = None,
    chat_template_config: TemplateVariablesOption = None,
    json: JsonOption = False,
) -> None:
    """Answer one prompt on the neurons that it selects."""
    text = once(lambda: read_prompt(given_prompt(words, prompt)))
    choice.check_exclusive(budget)
    schema = None if json_schema is None else read_schema(json_schema)
    runtime = open_runtime(
        model,
        choice,
        budget,
        selecting,
        sampling,
        template=not ignore_chat_template,
        variables=chat_template_config,
    )
    with progress("prefill", "tokens") as update:
        said, stats = answer(
            runtime,
            as_messages(text, system_prompt),
            streams=not json,
            max_tokens=max_tokens,
            instruction=text,
            progress=update,
            json_schema=schema,
        )
    if json:
        result_json({"text": said, **asdict(stats)})
    else:
        show()
        note(report(stats))


def answer(runtime: Runtime, prompt: Prompt, *, streams: bool = False, **options: Any) -> tuple[str, Stats]:
    """Answer a prompt as the runtime says, and with more options of `stream_generate`.

    Args:
        streams: write the text to stdout as it comes.

    Returns:
        The text and its figures.
    """
    from ifprune_mlx import stream_generate

    said, stats = "", None
    for response in stream_generate(runtime.model, runtime.tokenizer, prompt, **{**runtime.arguments, **options}):
        said, stats = said + response.text, response.stats
        if streams:
            show_answer(response.text)
    assert stats is not None  # the last response has them
    return said, stats


def read_schema(file: Path) -> dict[str, Any]:
    """The JSON schema in a file; raises GrammarError if there is none."""
    from ifprune_mlx.checkpoint.regular_file import read_json_object
    from ifprune_mlx.errors import GrammarError

    return read_json_object(file, GrammarError)


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
            raise PromptError(f"stdin, byte {exc.start}: not UTF-8 text; convert it, for example with iconv") from exc
    if not prompt.strip():
        raise PromptError("the prompt is empty; write something to answer")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as exc:  # bytes of the command line that were not UTF-8
        raise PromptError(f"{option} is not UTF-8 text; convert it, or pass it through stdin with {option} -") from exc
    return prompt


def as_messages(text: str, system_prompt: str | None) -> list[dict[str, Any]]:
    """One user message, after the system prompt if there is one."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]
