"""`ifprune doctor`: does this selector follow the instruction, or has it collapsed?"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, progress, result_json, show
from .evaluate import EvalSeedOption, MaxLengthOption
from .evaluate_report import overlap_words
from .loading import load_model
from .options import (
    DataOption,
    DensityOption,
    DtypeOption,
    IgnoreTemplateOption,
    ModelOption,
    TrustOption,
    named_files,
)
from .shipped import shipped_records, with_own_answers

if TYPE_CHECKING:
    from ifprune_mlx.eval.diagnose import Diagnosis

NOT_DYNAMIC = 3
"""Exit code of `--strict` for every other verdict; 1 is for what cannot be judged, as with all commands."""

# For a verdict within minutes on two CPU cores; the shipped prompts are to be answered first.
_LIMIT, _SHIPPED_LIMIT = 20, 8


class JudgedName(str, Enum):
    """The selectors that read the instruction."""

    learned = "learned"
    activation = "activation"


def doctor(
    data: DataOption = None,
    model: ModelOption = None,
    selector: Annotated[
        Optional[JudgedName],
        typer.Option("--selector", help="Whom to judge.  [default: learned, if the checkpoint has a predictor]"),
    ] = None,
    density: DensityOption = None,
    limit: Annotated[
        Optional[int],
        typer.Option(
            "--limit",
            metavar="N",
            min=2,
            help=f"Prompts per domain, picked by the seed.  [default: {_LIMIT}; {_SHIPPED_LIMIT} without --data]",
        ),
    ] = None,
    max_length: MaxLengthOption = 256,
    seed: EvalSeedOption = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help=f"Exit with {NOT_DYNAMIC} unless the verdict is dynamic.")
    ] = False,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    ignore_chat_template: IgnoreTemplateOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Say whether selections follow the instruction: dynamic, static or broken.

    A prompt's answer is measured under the prompt's own selection and under that of another prompt of its domain. Only
    if its own is better beyond doubt (95 %) is the verdict dynamic.
    """
    from ifprune_mlx import make_selector
    from ifprune_mlx.eval.diagnose import DYNAMIC, diagnose
    from ifprune_mlx.eval.evaluator import encode_domains, read_domains

    limit = limit or (_LIMIT if data else _SHIPPED_LIMIT)
    records = read_domains(named_files(data), note) if data else shipped_records(limit, max_length, seed)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code, template=not ignore_chat_template)
    name = selector.value if selector is not None else "learned" if loaded.checkpoint.has_predictor else "activation"
    chooser = make_selector(loaded, name, seed=seed)
    keep = loaded.keep(density)
    if not data:
        note("no --data: judging on prompts that come with the package, and on the dense model's own answers to them")
        records = with_own_answers(loaded, tokenizer, records, max_length, seed)
    examples = encode_domains(loaded, tokenizer, records, limit=limit, max_length=max_length, seed=seed, report=note)
    with progress("doctor", "tokens") as update:
        diagnosis = diagnose(loaded, examples, chooser, keep, seed=seed, progress=update)
    if json:
        result_json(diagnosis.to_dict())
    else:
        show(diagnosis.explanation)
        _figures(diagnosis)
    return NOT_DYNAMIC if strict and diagnosis.verdict != DYNAMIC else 0


def _figures(diagnosis: Diagnosis) -> None:
    if (measured := diagnosis.evaluation) is not None:
        losses = ", ".join(f"{name} {measured.nll(name):.3f}" for name in measured.selectors)
        note(f"nats per answer token: {losses}")
        note(f"overlap of {diagnosis.selector}'s selections: {overlap_words(measured.overlap[diagnosis.selector])}")
