"""`ifprune atlas`: what a selector does, drawn: who shares neurons, whose they are, what quality and time they cost."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import note, progress, result_json, show
from .evaluate import MaxLengthOption
from .evaluate_report import overlap_words
from .loading import load_model, model_name
from .options import (
    DataOption,
    DensityOption,
    DtypeOption,
    IgnoreTemplateOption,
    ModelOption,
    SelectorOption,
    TrustOption,
    named_files,
)
from .shipped import shipped_records, without_answers

if TYPE_CHECKING:
    from ifprune_mlx.eval.analysis import Survey

# An option under a heading of `--help`.
_chart, _time = (partial(typer.Option, rich_help_panel=heading) for heading in ("Charts", "Timing"))

OutOption = Annotated[
    Path, _chart("--out", metavar="FOLDER", help="For the charts, each as .png and .svg; made if missing.")
]
EvaluationOption = Annotated[
    Optional[Path],
    _chart(
        "--evaluation", metavar="FILE", help="A file of `ifprune evaluate --densities --json FILE`: one chart more."
    ),
]
TimedOption = Annotated[
    int, _time("--timed", metavar="N", min=0, help="Prompts to answer and time; 0 leaves that chart out.")
]
TimedTokensOption = Annotated[
    int, _time("--max-tokens", "-m", min=1, help="Most tokens to generate for a timed answer.")
]


def atlas(
    out: OutOption,
    data: DataOption = None,
    model: ModelOption = None,
    selector: SelectorOption = None,
    density: DensityOption = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="Prompts per domain, picked by the seed.")
    ] = 20,
    evaluation: EvaluationOption = None,
    timed: TimedOption = 6,
    max_tokens: TimedTokensOption = 64,
    max_length: MaxLengthOption = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the pick, and of the random selector.")] = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    ignore_chat_template: IgnoreTemplateOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers behind the charts, one JSON object.")] = False,
) -> None:
    """Draw what a selector selects for the prompts of some domains, and what that costs.

    Without --data the prompts are some that come with the package: code, maths and general.

    Charts: the overlap of every two prompts; whose neurons each layer has; where an answer's time goes; with
    --evaluation the loss against active parameters.
    """
    from ifprune_mlx.eval.plots import check_library

    # Whatever can be wrong is better found before selecting than after it.
    check_library()
    _check_out(out)
    from ifprune_mlx import make_selector
    from ifprune_mlx.eval import analysis
    from ifprune_mlx.eval.evaluator import encode_domains, read_domains

    if data:
        records = read_domains(named_files(data), note)
    else:
        note("no --data: drawn for prompts that come with the package")
        records = without_answers(shipped_records(limit, max_length, seed))
    quality = None if evaluation is None else analysis.Quality.read(evaluation)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code, template=not ignore_chat_template)
    chosen = make_selector(loaded, None if selector is None else selector.value, seed=seed)
    examples = encode_domains(loaded, tokenizer, records, limit=limit, max_length=max_length, seed=seed, report=note)
    with progress("select", "prompts") as update:
        found = analysis.survey(loaded, examples, chosen, loaded.keep(density), progress=update)
    value, charts = found.to_dict(), {"overlap": analysis.overlap_chart(found), "shared": analysis.shared_chart(found)}
    if quality is not None:
        value["quality"], charts["quality"] = quality.to_dict(), analysis.quality_chart(model_name(model), quality)
    if timed:
        budget = {"count": timed, "max_tokens": max_tokens, "seed": seed}
        with progress("answer", "answers") as update:
            times = analysis.time_answers(loaded, tokenizer, examples, chosen.name, density, progress=update, **budget)
        value |= {"time": [asdict(timing) for timing in times], "machine": (where := analysis.machine())}
        charts["time"] = analysis.time_chart(times, f"{chosen.name}, density {found.density:.2f} ({where})")
    files = _write(charts, out)
    if json:
        result_json({**value, "files": [str(file) for file in files]})
    else:
        show("\n".join(map(str, files)))
    _notes(found)
    if quality is None:
        note("no chart of quality: it needs --evaluation, a file of `ifprune evaluate --densities LIST --json FILE`")


def _check_out(out: Path) -> None:
    """Raise IfpruneError unless `out` is a folder, or can be made one, that can be written to."""
    from ifprune_mlx import IfpruneError

    existing = next(place for place in (out, *out.absolute().parents) if place.exists() or place.is_symlink())
    if not existing.is_dir():
        raise IfpruneError(f"--out {out}: {existing} is no folder; give another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise IfpruneError(f"--out {out}: {existing} cannot be written to; check permissions, or write elsewhere")


def _write(charts: dict[str, Any], out: Path) -> list[Path]:
    from ifprune_mlx.errors import IfpruneError, reason_of
    from ifprune_mlx.eval.plots import SUFFIXES, write_figure

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise IfpruneError(f"--out {out}: cannot be made ({reason_of(exc)}); write elsewhere") from exc
    files = {out / f"atlas-{name}{suffix}": figure for name, figure in charts.items() for suffix in SUFFIXES}
    for file, figure in files.items():
        write_figure(figure, file)
    return list(files)


def _notes(found: Survey) -> None:
    from ifprune_mlx.eval.metrics import POOLED

    counts = ", ".join(f"{len(keys)} {domain}" for domain, keys in found.prompts.items())
    note(f"{found.selector}, density {found.density:.3f}: selections of {counts} prompts")
    if shares := overlap_words(found.overlap):
        note(f"two prompts share {shares}; by chance {found.overlap.chance:.3f}")
    for gap in found.differences:
        if gap.domain == POOLED:
            note(f"a prompt shares {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] more with its own domain's")
