"""`ifprune atlas`: what a selector does, drawn: who shares neurons, whose they are, what quality and time they cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import note, progress, result_json
from .evaluate import MaxLengthOption
from .loading import load_model
from .options import DataOption, DensityOption, DtypeOption, ModelOption, SelectorOption, TrustOption, named_files

if TYPE_CHECKING:
    from ifprune_mlx.eval.analysis import Survey

_CHARTS, _TIME = "Charts", "Timing"

OutOption = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FOLDER",
        rich_help_panel=_CHARTS,
        help="For the charts, each as .png and .svg; made if missing.",
    ),
]
EvaluationOption = Annotated[
    Optional[Path],
    typer.Option(
        "--evaluation",
        metavar="FILE",
        rich_help_panel=_CHARTS,
        help="What `ifprune evaluate --densities --json FILE` wrote: one chart more.",
    ),
]
TimedOption = Annotated[
    int,
    typer.Option(
        "--timed",
        metavar="N",
        min=0,
        rich_help_panel=_TIME,
        help="Prompts to answer and time; 0 leaves that chart out.",
    ),
]
TimedTokensOption = Annotated[
    int,
    typer.Option(
        "--max-tokens", "-m", min=1, rich_help_panel=_TIME, help="Most tokens to generate for a timed answer."
    ),
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
    json: Annotated[bool, typer.Option("--json", help="Print the numbers behind the charts, one JSON object.")] = False,
) -> None:
    """Draw what a selector selects for the prompts of some domains, and what that costs.

    Charts: the overlap of every two prompts; whose neurons each layer has; where an answer's time goes; with
    --evaluation the loss against active parameters.
    """
    from ifprune_mlx import DataError
    from ifprune_mlx.eval.plots import check_library

    # Whatever can be wrong is better found before selecting than after it.
    if not data:
        raise DataError("atlas needs prompts; give --data NAME=FILE.jsonl, once for every domain")
    check_library()
    _check_out(out)
    from ifprune_mlx.eval.analysis import Quality, draw_atlas
    from ifprune_mlx.eval.evaluator import encode_domains, read_domains

    records = read_domains(named_files(data), note)
    quality = None if evaluation is None else Quality.read(evaluation)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    examples = encode_domains(loaded, tokenizer, records, limit=limit, max_length=max_length, seed=seed, report=note)
    found = draw_atlas(
        loaded,
        tokenizer,
        examples,
        None if selector is None else selector.value,
        density,
        name=loaded.checkpoint.path.name if model is None else Path(model).name,
        quality=quality,
        timed=timed,
        max_tokens=max_tokens,
        seed=seed,
        progress=progress,
    )
    files = _write(found.charts, out)
    if json:
        result_json({**found.to_dict(), "files": [str(file) for file in files]})
    else:
        print("\n".join(map(str, files)))
    _notes(found.survey)
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
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.eval.plots import SUFFIXES, write_figure

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise IfpruneError(f"--out {out}: cannot be made ({exc.strerror or exc}); write elsewhere") from None
    files = {out / f"atlas-{name}{suffix}": figure for name, figure in charts.items() for suffix in SUFFIXES}
    for file, figure in files.items():
        write_figure(figure, file)
    return list(files)


def _notes(found: Survey) -> None:
    from ifprune_mlx.eval.metrics import POOLED

    counts = ", ".join(f"{len(keys)} {domain}" for domain, keys in found.prompts.items())
    note(f"{found.selector}, density {found.density:.3f}: selections of {counts} prompts")
    shares = [("within a domain", found.overlap.within), ("across domains", found.overlap.across)]
    told = [f"{share:.3f} {whose}" for whose, share in shares if share is not None]
    if told:
        note(f"two prompts share {', '.join(told)}; by chance {found.overlap.chance:.3f}")
    pooled = [difference for difference in found.differences if difference.domain == POOLED]
    for found_difference in pooled:
        low, high = found_difference.low, found_difference.high
        note(f"a prompt shares {found_difference.mean:+.3f} [{low:+.3f}, {high:+.3f}] more with its own domain's")
