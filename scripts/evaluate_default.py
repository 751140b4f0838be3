"""Evaluates the shipped default beside its controls, on prompts of seen and of unseen sources side by side.

    python scripts/evaluate_default.py --limit 30        # minutes
    python scripts/evaluate_default.py --out docs        # the full table, and the plot in the docs
    python scripts/evaluate_default.py --data mine=chats.jsonl --sets unseen
    python scripts/evaluate_default.py --before-healing  # a predictor alone: an hour or two
    python scripts/evaluate_default.py --candidate OUT   # what scripts/make_default.py --out OUT wrote

Training reads other prompts of the seen sources (scripts/held_out) and nothing of the unseen ones
(scripts/held_out/unseen). A density's tables are printed as soon as it is measured. Rows:

    published      SmolLM2-135M-Instruct as published, dense
    dense          the default's weights with all neurons, for which they were not tuned
    learned        the default: each prompt's own selection
    mismatched     the default under the selection of another prompt of the same file
    oracle         selected by the answer's own activations (with --oracle)
    healed-static  one fixed selection, by scores learned on the same batches, and weights tuned for it on them
                   (scripts/controls/healed-static)
    healed-dense   weights tuned with all neurons on the same batches (where there is scripts/controls/healed-dense)

Checkpoints are made in the cache at first use. Before healing there is one: the published weights and the predictor in
`scripts/controls/before-healing`, whose mean over training instructions is the static selection that it is compared
with (docs/log.md says how it was trained).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from ifprune_cli.console import note, progress
from ifprune_cli.options import named_files
from ifprune_convert.embedded import cache_folder, embedded_gguf, ensure_embedded
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import load
from ifprune_mlx.checkpoint.atomic_write import sha256_file
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.eval import EvalConfig, evaluate
from ifprune_mlx.eval.analysis import Quality, quality_chart
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.metrics import POOLED
from ifprune_mlx.eval.plots import write_figure

HERE = Path(__file__).parent
SETS = {"seen": HERE / "held_out", "unseen": HERE / "held_out" / "unseen"}
SELECTORS = ("dense", "learned", "mismatched", "oracle")
BEFORE_HEALING = ("dense", "static", "static-own", "learned", "mismatched", "oracle")
PAIRS = (
    ("learned", "healed-static"),
    ("learned", "static"),
    ("learned", "static-own"),
    ("learned", "mismatched"),
    ("learned", "healed-dense"),
    ("healed-static", "healed-dense"),
    ("oracle", "static"),
    ("learned", "published"),
)


def checkpoint(name: str, **parts: Path) -> Path:
    """The published model with these parts of `Options`, made in the cache at first use."""
    files = [file for part in parts.values() for file in (sorted(part.glob("*.safetensors")) or [part])]
    target = cache_folder() / "-".join([name, *(sha256_file(file)[:8] for file in files)])
    if not target.is_dir():
        options = replace(Options(dtype=mx.float32, density=0.5), **parts)
        convert(open_source(embedded_gguf(print)), target, options)
    return target


def controls(folder: Path) -> dict[str, Path]:
    """The checkpoints that were healed as long as the default."""
    static, dense = folder / "healed-static", folder / "healed-dense"
    found = {"static": checkpoint("healed-static", adapter=static, prior=static / "prior.safetensors")}
    if dense.is_dir():
        found["dense"] = checkpoint("healed-dense", adapter=dense)
    return found


def default(folder: Path) -> Path:
    """The checkpoint of a default that is not shipped yet."""
    adapter, predictor = folder / "adapter", folder / "predictor"
    return checkpoint("candidate", adapter=adapter, predictor=predictor, prior=folder / "prior.safetensors")


def before_healing() -> Path:
    """The checkpoint of the published weights with a predictor that was trained for them."""
    folder = HERE / "controls" / "before-healing"
    return checkpoint("before-healing", predictor=folder / "predictor", prior=folder / "prior.safetensors")


def tables(found: Evaluation, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Lines: losses and acceptance of every row, then the differences.

    Args:
        groups: by title (seen, unseen, own), names of domains; the evaluation calls them "title name".
    """
    parts = {title: _only(found, [f"{title} {name}" for name in names]) for title, names in groups.items()}
    heads, titles = [], []
    for title, names in groups.items():
        heads.append("".join(f"{name:>9}" for name in [*names, "mean"]))
        titles.append(f"{f'{title} sources':>{len(heads[-1])}}")
    yield f"density {found.density:.3f}; nats per answer token, mean over prompts; all domains count the same in a mean"
    yield f"{'':24}{' |'.join(titles)}"
    yield f"{'':24}{' |'.join(heads)}"
    columns = {title: [*part.keys, POOLED] for title, part in parts.items()}
    for row in found.selectors:
        cells = ["".join(f"{part.nll(row, name):9.3f}" for name in columns[title]) for title, part in parts.items()]
        yield f"{row:24}{' |'.join(cells)}"
    for row in found.selectors:
        shares = [[part.acceptance(row, name) for name in columns[title]] for title, part in parts.items()]
        if row not in ("published", "dense", "healed-dense") and None not in shares[0]:
            yield f"{f'accepted: {row}':24}{' |'.join(''.join(f'{share:9.3f}' for share in of) for of in shares)}"
    yield "differences, mean [95 % interval]; below 0 the first is better"
    for title, names in groups.items():
        yield f"{f'{title} sources':24}" + "".join(f"{name:>25}" for name in [*names, "mean"])
        for a, b in PAIRS:
            if a in found.selectors and b in found.selectors:
                gaps = [parts[title].difference(a, b, name) for name in columns[title]]
                cells = ["" if d is None else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in gaps]
                yield f"{f'{a} - {b}':24}" + "".join(f"{cell:>25}" for cell in cells)


def _only(found: Evaluation, domains: Sequence[str]) -> Evaluation:
    rows = tuple(row for row in found.rows if row.domain in domains)
    return replace(found, rows=rows, keys={name: found.keys[name] for name in domains})


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between; ValueError for anything else."""
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    """Evaluate every checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default="seen,unseen", help="of the repository's: seen, unseen, both (default), none")
    parser.add_argument("--domains", default="code,maths,general", help="of the sets; default: all three")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FILE", help="chats of your own; repeatable"
    )
    parser.add_argument("--limit", type=int, help="prompts per file; default: all")
    parser.add_argument("--densities", type=numbers, help="default: 0.27,0.5; before healing 0.5")
    parser.add_argument("--oracle", action="store_true", help="one row more")
    parser.add_argument("--no-dense", action="store_true", help="no row `dense`, and no acceptance: half the time")
    parser.add_argument("--before-healing", action="store_true")
    parser.add_argument("--candidate", type=Path, help="folder of a default that does not ship yet, and its controls")
    parser.add_argument("--out", type=Path, help="folder for quality.json and quality.svg")
    arguments = parser.parse_args()
    try:
        measure(arguments)
    except IfpruneError as exc:
        raise SystemExit(f"error: {exc}") from None


def measure(arguments: argparse.Namespace) -> None:
    """Measure all rows on all sets, and print each density's tables."""
    groups: dict[str, dict[str, str | Path]] = {}
    for title in arguments.sets.split(",") if arguments.sets != "none" else ():
        if title not in SETS:
            raise IfpruneError(f"--sets {title}: choose from {', '.join(SETS)} and none")
        groups[title] = {name: SETS[title] / f"{name}.jsonl" for name in arguments.domains.split(",")}
    if arguments.data:
        groups["own"] = dict(named_files(arguments.data))
    before, candidate = arguments.before_healing, arguments.candidate
    healed = {} if before else controls(candidate / "controls" if candidate else HERE / "controls")
    model = before_healing() if before else default(candidate / "default") if candidate else ensure_embedded(print)
    wanted = {*SELECTORS} - (set() if arguments.oracle else {"oracle"}) - ({"dense"} if arguments.no_dense else set())
    config = EvalConfig(
        model=model,
        data={f"{title} {name}": file for title, files in groups.items() for name, file in files.items()},
        selectors=BEFORE_HEALING if before else tuple(row for row in SELECTORS if row in wanted),
        densities=arguments.densities or ((0.5,) if before else (0.27, 0.5)),
        limit=arguments.limit,
        max_length=256 if before else 192,
        healed_static=healed.get("static"),
        healed_dense=healed.get("dense"),
    )
    run = partial(evaluate, load=partial(load, dtype=mx.float32), progress=progress, report=note)
    published = None  # before healing the row `dense` is that
    if not before:
        base = replace(config, model=ensure_embedded(print, trained=False), selectors=("dense",), densities=(None,))
        (published,) = run(replace(base, healed_static=None, healed_dense=None)).evaluations
    titles = {title: list(files) for title, files in groups.items()}
    complete: list[Evaluation] = []

    def show(found: Evaluation) -> None:
        complete.append(found if published is None else found.with_rows(published, {"published": "dense"}))
        print("\n".join(tables(complete[-1], titles)), end="\n\n", flush=True)

    result = replace(run(config, on_evaluation=show), evaluations=tuple(complete))
    if arguments.out is not None:
        value = result.to_dict()
        (arguments.out / "quality.json").write_text(json.dumps(value) + "\n", encoding="utf-8")
        write_figure(quality_chart(result.model, Quality.of(value, "--out")), arguments.out / "quality.svg")


if __name__ == "__main__":
    main()
