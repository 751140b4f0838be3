"""`ifprune doctor`: does this selector follow the instruction, or has it collapsed?"""

from __future__ import annotations

import json as encoder
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, progress, result_json
from .evaluate import MaxLengthOption, Records, read_data, sample
from .loading import load_model
from .options import DataOption, DensityOption, DtypeOption, ModelOption, TrustOption

if TYPE_CHECKING:
    from ifprune_mlx.eval.diagnose import Diagnosis

NOT_DYNAMIC = 3
"""Exit code of `--strict` for every other verdict; 1 is for what cannot be judged, as with all commands."""

# For a verdict within minutes on two CPU cores; the shipped chats have five sources.
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
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the pick, the random rows, the other prompts and the bootstrap.")
    ] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help=f"Exit with {NOT_DYNAMIC} unless the verdict is dynamic.")
    ] = False,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Say whether selections follow the instruction: dynamic, static or broken.

    A prompt's answer is measured under the prompt's own selection and under that of another prompt of its domain. Only
    if its own is better beyond doubt (95 %) is the verdict dynamic.
    """
    from ifprune_mlx import make_selector
    from ifprune_mlx.eval.diagnose import DYNAMIC, diagnose

    if data:
        records, count = read_data(data), limit or _LIMIT
    else:
        count = limit or _SHIPPED_LIMIT
        note(
            "no --data: judging on the shipped calibration chats; the prior was measured on such, which favours static"
        )
        records = _shipped()
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    name = selector.value if selector is not None else "learned" if loaded.checkpoint.has_predictor else "activation"
    chooser = make_selector(loaded, name, seed=seed)
    keep = loaded.keep(density)
    examples = sample(loaded, tokenizer, records, count, max_length, seed, note)
    with progress("doctor", "tokens") as update:
        diagnosis = diagnose(loaded, examples, chooser, keep, seed=seed, progress=update)
    if json:
        result_json(diagnosis.to_dict())
    else:
        print(diagnosis.explanation)
        _figures(diagnosis)
    return NOT_DYNAMIC if strict and diagnosis.verdict != DYNAMIC else 0


def _shipped() -> Records:
    """The calibration chats that come with the package, each of their sources as a domain."""
    from importlib.resources import files

    from ifprune_convert.calibrate import shipped_examples

    text = Path(str(files("ifprune_convert") / "data" / "calibration.jsonl")).read_text(encoding="utf-8")
    sources = [encoder.loads(line)["source"] for line in text.splitlines()]
    records: Records = {}
    for source, record in zip(sources, shipped_examples(), strict=True):
        records.setdefault(source, []).append(record)
    return records


def _figures(diagnosis: Diagnosis) -> None:
    value = diagnosis.to_dict()
    named = ["matched", "mismatched", "cross_domain", "static", "random"]
    told = [
        f"{name.replace('_', '-')} {value[f'{name}_nll']:.3f}" for name in named if value[f"{name}_nll"] is not None
    ]
    if told:
        note(f"nats per answer token: {', '.join(told)}")
    shares = [(where, value[f"overlap_{where}"]) for where in ("within", "across")]
    told = [f"{share:.3f} {where} domains" for where, share in shares if share is not None]
    if told:
        note(f"overlap of {diagnosis.selector}'s selections: {', '.join(told)}")
