"""`ifprune generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .console import note, progress, report, result_json
from .loading import check_selection, load_model
from .options import (
    ActiveParamsOption,
    Budget,
    DenseOption,
    DensityOption,
    DtypeOption,
    KvBitsOption,
    KvGroupSizeOption,
    MaxKvSizeOption,
    MemoryOption,
    MinPOption,
    ModelOption,
    PrefillStepOption,
    ResidencyOption,
    Sampling,
    SeedOption,
    Selecting,
    SelectionCacheOption,
    SelectionOption,
    SelectorOption,
    SelectWindowOption,
    SystemPromptOption,
    TaskOption,
    TempOption,
    TopKOption,
    TopPOption,
    TrustOption,
)


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The instruction; - reads it from stdin.")],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens to generate.")] = 256,
    system_prompt: SystemPromptOption = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Take the prompt as it is.")
    ] = False,
    selector: SelectorOption = None,
    select_window: SelectWindowOption = None,
    selection_cache: SelectionCacheOption = None,
    selection: SelectionOption = None,
    task: TaskOption = None,
    dense: DenseOption = False,
    density: DensityOption = None,
    active_params: ActiveParamsOption = None,
    memory: MemoryOption = None,
    residency: ResidencyOption = None,
    temp: TempOption = 0.0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    max_kv_size: MaxKvSizeOption = None,
    kv_bits: KvBitsOption = None,
    kv_group_size: KvGroupSizeOption = 64,
    prefill_step_size: PrefillStepOption = 2048,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
) -> None:
    """Answer one prompt on the neurons that it selects."""
    text = read_prompt(prompt)
    fixed = {"--dense": dense, "--selection": selection, "--task": task}
    check_exclusive(
        {**fixed, "--selector": selector},
        {**fixed, "--density": density, "--active-params": active_params},
    )
    from ifprune_mlx import Selection, TaskStore, stream_generate
    from ifprune_mlx.selection.presets import check_task_name

    chosen = None if selection is None else Selection.load(selection)
    if task is not None:
        check_task_name(task)
    budget = Budget(density, active_params, memory).arguments()
    sampling = Sampling(temp, top_p, min_p, top_k, seed, kv_bits, kv_group_size, prefill_step_size)
    options = sampling.arguments()
    loaded, tokenizer = load_model(model, dtype, trust_remote_code, residency=residency, memory=budget["memory"])
    sampling.check(loaded)
    Selecting(select_window, selection_cache).apply(loaded)
    if selection is not None and chosen is not None:
        check_selection(loaded, chosen, selection)
    if task is not None:
        chosen = TaskStore(loaded.checkpoint).load(task)
    said, response = "", None
    with progress("prefill", "tokens") as update:
        responses = stream_generate(
            loaded,
            tokenizer,
            text if ignore_chat_template else as_messages(text, system_prompt),
            max_tokens=max_tokens,
            selector=None if selector is None else selector.value,
            selection=chosen,
            dense=dense,
            instruction=text,
            seed=seed,
            max_kv_size=max_kv_size,
            progress=update,
            **budget,
            **options,
        )
        for response in responses:
            said += response.text
            if not json:
                sys.stdout.write(response.text)
                sys.stdout.flush()
    if response is None or response.stats is None:
        return
    if json:
        result_json({"text": said, **asdict(response.stats)})
    else:
        print()
        note(report(response.stats))


def check_exclusive(*groups: dict[str, Any]) -> None:
    """Raise IfpruneError if two options of a group are given, of which one would be ignored."""
    from ifprune_mlx import IfpruneError

    for group in groups:
        given = [name for name, value in group.items() if value not in (None, False)]
        if len(given) > 1:
            raise IfpruneError(f"{' and '.join(given)} exclude each other; give one of them")


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
