"""An atlas of a selector, as numbers and as charts.

overlap  the share of kept neurons that every two prompts have in common (the paper's Figure 4)
shared   each layer's neurons that all domains, some domains, single prompts, or no prompts select
quality  loss against active parameters, from the JSON of `ifprune evaluate`
time     select, switch, prefill and decode of real answers
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.checkpoint.regular_file import read_bounded
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import DataError, reason_of
from ifprune_mlx.eval.losses import prompt_tokens
from ifprune_mlx.eval.metrics import (
    POOLED,
    Difference,
    Overlap,
    Values,
    kept_neurons,
    mean_overlaps,
    paired_differences,
)
from ifprune_mlx.eval.plots import Matrix, Panel, Series, band_chart, bar_chart, line_chart, matrix_chart
from ifprune_mlx.generation import stream_generate
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.selection.cache import SelectionCache
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import Instruction, Selector, make_selector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BANDS = ("all domains", "some domains", "single prompts", "nobody")
"""Who selects a neuron. A domain does if at least half of its prompts do; `single prompts` means that only fewer do."""

PARTS = ("select", "switch", "prefill", "decode")

_HALF = 0.5
_LEVELS = ("dense", "healed-dense")  # their loss does not depend on the density
_WARM_UP = 4
_LARGEST_EVALUATION = 1 << 26  # bytes


@dataclass(frozen=True)
class Survey:
    """A selector's selections for the prompts of some domains."""

    selector: str
    density: float  # kept neurons / all neurons
    prompts: dict[str, tuple[str, ...]]  # prompt keys by domain, in the order of the matrix
    matrix: Values  # float64 `[prompts, prompts]`, share of neurons in common, mean over FFNs
    bands: dict[str, list[float]]  # by name from `BANDS`, the share of each FFN's neurons; sums to 1
    overlap: Overlap  # the matrix's means over domains
    # By domain, overlap with its own other prompts minus overlap with other domains' prompts; empty for one domain.
    differences: list[Difference]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; shares are from 0 to 1."""
        return {
            "selector": self.selector,
            "density": self.density,
            "chance": self.overlap.chance,
            "prompts": {domain: list(keys) for domain, keys in self.prompts.items()},
            "matrix": self.matrix.tolist(),
            "overlap": self.overlap.to_dict(),
            "differences": [difference.to_dict() for difference in self.differences],
            "neurons_of": self.bands,
        }


@dataclass(frozen=True)
class Quality:
    """Losses at one density or more."""

    total_parameters: int  # of the dense model
    # Active parameters, ascending, each with losses by domain and selector, in nats per answer token.
    curve: tuple[tuple[int, dict[str, dict[str, float]]], ...]

    @classmethod
    def of(cls, value: Any, where: str) -> Quality:
        """Parse the JSON object of `ifprune evaluate --densities ... --json`.

        Args:
            where: the source, for messages.

        Raises:
            DataError: if it is anything else, or no loss depends on the density.
        """
        if isinstance(value, dict) and "rows" in value and "curve" not in value:
            raise DataError(f"{where}: holds one density, without its parameters; write it with `evaluate --densities`")
        try:
            total = int(value["total_parameters"])
            curve = [(int(point["active_parameters"]), _losses(point["rows"])) for point in value["curve"]]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise DataError(f"{where}: not what `ifprune evaluate --densities LIST --json FILE` writes") from exc
        shapes = [{domain: list(losses) for domain, losses in found.items()} for _, found in curve]
        if not any(shapes) or any(shape != shapes[0] for shape in shapes):
            raise DataError(f"{where}: needs losses, and of all densities the same; evaluate with --data and try again")
        if any(set(names) <= set(_LEVELS) for names in shapes[0].values()):
            raise DataError(f"{where}: holds nothing but dense models' losses; evaluate a selector as well")
        return cls(total, tuple(sorted(curve, key=lambda point: point[0])))

    @classmethod
    def read(cls, path: Path) -> Quality:
        """Read a file of `ifprune evaluate --densities ... --json`.

        Raises:
            DataError: if it cannot be read or holds anything else.
        """
        try:
            value: Any = json.loads(read_bounded(path, _LARGEST_EVALUATION))
        except OSError as exc:
            raise DataError(f"{path}: cannot be read ({reason_of(exc)}); give another file") from exc
        except (ValueError, RecursionError) as exc:
            hint = "give a file of `ifprune evaluate --densities LIST --json FILE`"
            raise DataError(f"{path}: not JSON; {hint}") from exc
        return cls.of(value, str(path))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        points = [{"active_parameters": active, "nll": losses} for active, losses in self.curve]
        return {"total_parameters": self.total_parameters, "curve": points}


@dataclass(frozen=True)
class Timing:
    """The times of one answer, in seconds, as in `ifprune_mlx.Stats`."""

    domain: str
    prompt: str
    prompt_tokens: int
    completion_tokens: int
    select_s: float
    switch_s: float
    prefill_s: float
    decode_s: float


def survey(
    model: Model,
    data: Mapping[str, Sequence[Example]],
    selector: Selector,
    keep: Sequence[int],
    *,
    progress: Progress | None = None,
) -> Survey:
    """Select for every prompt. All selections stay in memory until the end, 4 bytes per kept neuron.

    Args:
        data: examples by domain, at least one each.
        keep: *k* per FFN.
        progress: called with (prompts done, all prompts).

    Raises:
        PredictorError, SelectionError: from the selectors.
    """
    total, done = sum(len(examples) for examples in data.values()), 0
    chosen: dict[str, list[Selection]] = {domain: [] for domain in data}
    for domain, examples in data.items():
        for example in examples:
            instruction = Instruction(example.instruction, prompt_tokens(example))
            chosen[domain].append(selector.select(instruction, keep).selection)
            mx.clear_cache()
            done += 1
            if progress is not None:
                progress(done, total)
    flat = [selection for selections in chosen.values() for selection in selections]
    domains = np.repeat(np.arange(len(data)), [len(examples) for examples in data.values()])
    shared = np.zeros((total, total))
    bands: dict[str, list[float]] = {name: [] for name in BANDS}
    for kept, k in zip(kept_neurons(flat), flat[0].keep, strict=True):
        shared += (kept @ kept.T).astype(np.float64) / k
        owners = np.sum([kept[domains == domain].mean(axis=0) >= _HALF for domain in range(len(data))], axis=0)
        everyone, some = owners == len(data), (owners > 0) & (owners < len(data))
        single = (owners == 0) & (kept.sum(axis=0) > 0)
        for name, which in zip(BANDS, (everyone, some, single, ~(everyone | some | single)), strict=True):
            bands[name].append(float(which.mean()))
    matrix = shared / len(flat[0].keep)
    return Survey(
        selector.name,
        flat[0].density,
        {domain: tuple(example.key for example in examples) for domain, examples in data.items()},
        matrix,
        bands,
        mean_overlaps(chosen),
        _own_minus_others(matrix, list(data), domains),
    )


def time_answers(
    model: Model,
    tokenizer: TokenizerWrapper,
    data: Mapping[str, Sequence[Example]],
    selector: str | None,
    density: float | None,
    *,
    count: int,
    max_tokens: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time the answers to prompts of all domains in turn.

    A short answer to the last prompt comes first, untimed, to warm up. So each switch begins at another prompt's
    selection, as in use, unless there is only one prompt. The model's selection cache is not used.

    Args:
        data: examples by domain.
        selector: name; None takes the checkpoint's default.
        density: None takes the checkpoint's default.
        count: most prompts, at least 1.
        max_tokens: limit of each answer.
        seed: of the random selector.
        progress: called with (answers done, all answers).

    Raises:
        PromptError, SelectionError, PredictorError: from `stream_generate`.
    """
    turns = zip_longest(*([(domain, example) for example in examples] for domain, examples in data.items()))
    examples = [pair for turn in turns for pair in turn if pair is not None][:count]
    result: list[Timing] = []
    usual, model.selection_cache = model.selection_cache, SelectionCache(entries=0)
    try:
        uncached = make_selector(model, selector, seed=seed)
    finally:
        model.selection_cache = usual
    for number, (domain, example) in enumerate([examples[-1], *examples]):
        *_, last = stream_generate(
            model,
            tokenizer,
            prompt_tokens(example),
            max_tokens=max_tokens if number else min(max_tokens, _WARM_UP),
            selector=uncached,
            density=density,
            instruction=example.instruction,
        )
        stats = last.stats
        assert stats is not None  # the last response of an answer has them
        if number:
            times = (stats.select_s, stats.switch_s, stats.prefill_s, stats.decode_s)
            result.append(Timing(domain, example.key, stats.prompt_tokens, stats.completion_tokens, *times))
        if progress is not None:
            progress(number, len(examples))
    return result


def overlap_chart(found: Survey) -> Figure:
    """Draw the overlap of every two prompts, and the means over domains."""
    names = list(found.prompts)
    means = np.full((len(names), len(names)), np.nan)
    for row, column in np.ndindex(means.shape):
        layers = found.overlap.domains[names[row]][names[column]]
        means[row, column] = np.nan if layers is None else layers.mean()
    counts = tuple((name, len(keys)) for name, keys in found.prompts.items())
    prompts = Matrix("every two prompts", found.matrix, counts)
    domains = Matrix("mean over pairs of different prompts", means, tuple((name, 1) for name in names))
    chance = found.overlap.chance
    return matrix_chart(
        f"Neurons that two prompts share: {found.selector}, density {found.density:.2f}",
        "prompts by domain",
        f"share of kept neurons in common (chance: {chance:.2f})",
        [prompts, domains],
        min(chance, 0.99),  # all neurons are kept where chance is 1
        1.0,
    )


def shared_chart(found: Survey) -> Figure:
    """Draw who selects each layer's neurons."""
    return band_chart(
        f"Who selects a layer's neurons: {found.selector}, density {found.density:.2f}",
        "layer (a domain selects a neuron if at least half of its prompts do)",
        "% of the layer's neurons",
        {name: [100 * share for share in shares] for name, shares in found.bands.items()},
    )


def quality_chart(name: str, quality: Quality) -> Figure:
    """Draw losses against active parameters: a panel per domain, after one over all domains if there are several.

    Of a single density they are bars.

    Args:
        name: of the model.
    """
    first = quality.curve[0][1]
    every = [(active, _with_mean(losses)) for active, losses in quality.curve]
    titles = {POOLED: "mean over domains"} if len(first) > 1 else {}
    titles |= {domain: domain for domain in first}
    if len(every) == 1:
        active, losses = every[0]
        where = f"{active / 1e6:.1f}M of {quality.total_parameters / 1e6:.1f}M parameters active"
        bars = {title: losses[domain] for domain, title in titles.items()}
        return bar_chart(f"{name}: loss of given answers", f"nats per answer token, {where}", bars)
    panels = []
    for domain, title in titles.items():
        series = []
        for selector in every[0][1][domain]:
            points = [(float(active), losses[domain][selector]) for active, losses in every]
            level = selector in _LEVELS
            series.append(Series(selector, tuple(points[:1] if level else points), level))
        panels.append(Panel(title, tuple(series)))
    label = f"active parameters, of {quality.total_parameters / 1e6:.1f}M"
    return line_chart(f"{name}: loss of given answers", label, "nats per answer token", panels)


def time_chart(timings: Sequence[Timing], where: str) -> Figure:
    """Draw a bar of select, switch, prefill and decode for every answer.

    Args:
        where: selector and machine, for the title.
    """
    seen: dict[str, int] = {}
    bars = {}
    for timing in timings:
        number = seen[timing.domain] = seen.get(timing.domain, 0) + 1
        name = f"{timing.domain} {number}: {timing.prompt_tokens} tokens in, {timing.completion_tokens} out"
        bars[name] = {part: float(getattr(timing, f"{part}_s")) for part in PARTS}
    return bar_chart(f"Where an answer's time goes: {where}", "seconds", bars, stacked=True)


def machine() -> str:
    """System, processor and MLX's device, such as `Darwin arm64, gpu`."""
    return f"{platform.system()} {platform.machine()}, {mx.default_device().type.name}"


def difference_chart(title: str, one: Selection, other: Selection, name: str) -> Figure:
    """Draw how much of each layer two selections of one model keep, both or one of them.

    Args:
        name: of the other, such as `static`.
    """
    bands: dict[str, list[float]] = {"both": [], "this prompt only": [], f"{name} only": []}
    for ids, others, width in zip(one.ids, other.ids, one.widths, strict=True):
        common = np.intersect1d(ids, others, assume_unique=True).size
        for band, count in zip(bands.values(), (common, ids.size - common, others.size - common), strict=True):
            band.append(100 * count / width)
    label = f"layer ({one.selector}, density {one.density:.2f})"
    return band_chart(title, label, "% of the layer's neurons, kept for", bands)


def selections_chart(title: str, selections: Mapping[str, Selection]) -> Figure:
    """Draw the overlap of every two selections of one model, which may differ in density.

    Args:
        selections: by name, at least two.
    """
    flat = list(selections.values())
    values = np.array([[one.overlap(other) for other in flat] for one in flat])
    matrix = Matrix("", values, tuple((name, 1) for name in selections))
    label = "share of the row's neurons that the column keeps, too"
    low = min(float(values.min()), *(selection.density for selection in flat), 0.99)
    return matrix_chart(title, "selected by", label, [matrix], low, 1.0)


def _own_minus_others(matrix: Values, names: Sequence[str], domains: npt.NDArray[np.int64]) -> list[Difference]:
    """Per domain, its prompts' mean overlap with one another minus that with other domains', paired by prompt."""
    pairs: dict[str, dict[str, list[float]]] = {}
    for index, name in enumerate(names):
        own = np.flatnonzero(domains == index)
        if len(own) < 2 or len(own) == len(domains):
            continue
        inside = (matrix[np.ix_(own, own)].sum(axis=1) - matrix[own, own]) / (len(own) - 1)
        pairs[name] = {"own": inside.tolist(), "others": matrix[own][:, domains != index].mean(axis=1).tolist()}
    return paired_differences(pairs)


def _losses(rows: Any) -> dict[str, dict[str, float]]:
    """Losses by domain and selector, from evaluate's rows; `Quality.of` catches the errors for anything else."""
    result: dict[str, dict[str, float]] = {}
    for row in rows:
        selector, domain, loss = row["selector"], row["domain"], float(row["nll"])
        if not math.isfinite(loss) or not all(
            isinstance(name, str) and name.isprintable() for name in (selector, domain)
        ):
            raise ValueError  # names are drawn, and an SVG holds no control characters
        result.setdefault(domain, {})[selector] = loss
    return result


def _with_mean(losses: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Add the mean over domains as a domain."""
    names = next(iter(losses.values()))
    return losses | {POOLED: {name: float(np.mean([row[name] for row in losses.values()])) for name in names}}
