"""Is a selector instruction-following, or has it collapsed? A verdict from a few prompts of a domain or more.

Every prompt's answer is measured under the prompt's own selection (matched), under what the same selector makes of
another prompt of the *same* domain (mismatched) and of another domain, under the static selection and under arbitrary
neurons, all at one density and with the prompt computed under the same selection. The rule, the first that applies:

broken   the selector gives no selection (its scores are not numbers)
static   the selections of two prompts of a domain are the same, or nearly: they agree beyond chance by 0.99 or more
broken   matched is not below random: the 95 % interval of matched - random does not end below 0
dynamic  matched is below mismatched: the 95 % interval of matched - mismatched ends below 0
static   otherwise: a prompt is served no better by its own selection than by its neighbour's

Differences are taken over all domains together (`ifprune_mlx.eval.metrics`). The other prompt is of the same domain
because a selector that only tells code from prose, say, follows the domain and not the instruction. That the verdict
is `dynamic` does not mean that the selector is worth having: whether static is better is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import DataError, PredictorError, SelectionError
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.losses import compare, density_of
from ifprune_mlx.eval.metrics import Difference, Overlap
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.selection.selectors import Instruction, Selected, Selector

DYNAMIC, STATIC, BROKEN = "dynamic", "static", "broken"
MIN_PROMPTS = 10
"""With fewer prompts than this, over all domains, an interval means nothing."""

_SAME = 0.99


@dataclass(frozen=True)
class Diagnosis:
    """A verdict with its figures.

    Attributes:
        verdict: `dynamic`, `static` or `broken`.
        explanation: one sentence.
        selector: whose verdict it is.
        density: of the selections.
        evaluation: what was measured; None if there was no selection to measure.
    """

    verdict: str
    explanation: str
    selector: str
    density: float
    evaluation: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `ifprune doctor --json` writes; what was not measured is None."""
        measured, losses = self.evaluation, ("matched", "mismatched", "cross-domain", "static", "random")
        present = [] if measured is None else measured.selectors
        overlap = None if measured is None else measured.overlap[self.selector]
        within, across = (None, None) if overlap is None else (overlap.within, overlap.across)
        return {
            "verdict": self.verdict,
            "explanation": self.explanation,
            "selector": self.selector,
            "density": self.density,
            **{f"{n.replace('-', '_')}_nll": measured.nll(n) if measured and n in present else None for n in losses},
            "overlap_within": within,
            "overlap_across": across,
            "agreement_within": None if overlap is None else overlap.agreement(within),
            "agreement_across": None if overlap is None else overlap.agreement(across),
            "domains": {} if measured is None else {name: len(keys) for name, keys in measured.keys.items()},
            "differences": [d.to_dict() for d in (measured.differences if measured else []) if "matched" in (d.a, d.b)],
        }


def diagnose(
    model: Model,
    data: Mapping[str, Sequence[Example]],
    selector: Selector,
    keep: Sequence[int],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure a selector and judge it by the rule above.

    Args:
        data: examples by domain, at least two a domain and `MIN_PROMPTS` in all.
        keep: per FFN, *k*.
        seed: of who is whose other prompt, of the random selector and of the bootstrap.
        progress: called with (tokens read, tokens to read).

    Raises:
        DataError, IfpruneError: as `ifprune_mlx.eval.losses.compare` raises them, and for too few prompts.
    """
    prompts = sum(len(examples) for examples in data.values())
    if prompts < MIN_PROMPTS:
        raise DataError(f"{prompts} prompts are too few for a verdict; give {MIN_PROMPTS} or more")
    names = ["matched", "mismatched", *(["cross-domain"] if len(data) > 1 else []), "static", "random"]
    watched = _Watched(selector)
    try:
        measured = compare(model, data, names, keep, matched=watched, seed=seed, progress=progress)
    except _NoSelection as exc:
        sentence = f"broken: the selector gives no selection ({exc})"
        return Diagnosis(BROKEN, sentence, selector.name, density_of(model, keep))
    verdict, reason = _judge(measured, measured.overlap[selector.name])
    sentence = f"{verdict}: {reason} ({prompts} prompts, density {measured.density:.2f})"
    return Diagnosis(verdict, sentence, selector.name, measured.density, measured)


class _NoSelection(Exception):
    """The selector under judgement failed; never leaves this module."""


class _Watched:
    """A selector whose failures are findings."""

    def __init__(self, selector: Selector) -> None:
        self.name = selector.name
        self._selector = selector

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        try:
            return self._selector.select(instruction, keep)
        except (PredictorError, SelectionError) as exc:
            raise _NoSelection(str(exc)) from exc


def _judge(measured: Evaluation, overlap: Overlap) -> tuple[str, str]:
    """The verdict, and why."""
    agreement = overlap.agreement(overlap.within)
    assert agreement is not None
    if agreement >= _SAME:
        return STATIC, f"two prompts of a domain select the same neurons (agreement beyond chance {agreement:.3f})"
    random, other, static = (_needed(measured, name) for name in ("random", "mismatched", "static"))
    if random.high >= 0:
        return BROKEN, f"its selections are no better than arbitrary neurons: matched - random is {_figures(random)}"
    beside = f"; matched - static is {_figures(static)}"
    if static.low > 0:
        beside += ", so that the static selection serves better"
    if other.high < 0:
        return (
            DYNAMIC,
            f"a prompt's own selection beats its neighbour's: matched - mismatched is {_figures(other)}{beside}",
        )
    why = "a prompt's own selection serves it no better than that of another prompt of its domain"
    elsewhere = measured.difference("matched", "cross-domain")
    if elsewhere is not None and elsewhere.high < 0:
        why += ", though better than that of another domain's"
    return STATIC, f"{why}: matched - mismatched is {_figures(other)}{beside}"


def _needed(measured: Evaluation, name: str) -> Difference:
    found = measured.difference("matched", name)
    assert found is not None  # every domain has two prompts or more, or `compare` would have refused it
    return found


def _figures(difference: Difference) -> str:
    return f"{difference.mean:+.3f} nats per token, 95 % interval {difference.low:+.3f} to {difference.high:+.3f}"
