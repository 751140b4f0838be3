"""How a budget of hours is divided over the stages, and how much of each fits into its part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .config import STAGES, Stage
from .memory import Need

SHARES: Mapping[Stage, float] = {
    "convert": 0.04,
    "answers": 0.18,
    "calibrate": 0.14,
    "distill": 0.02,
    "select": 0.16,
    "heal": 0.30,
    "evaluate": 0.16,
}
"""Of the hours. Healing is what more time helps longest (docs/log.md)."""
BOUNDS: Mapping[Stage, tuple[int, int]] = {
    "answers": (96, 6000),
    "calibrate": (64, 2000),
    "select": (2, 2000),
    "heal": (2, 20000),
    "evaluate": (16, 600),
}
"""Least and most of what a stage does: answers, chats, steps, steps, prompts. More than that is time better spent on
the stages behind it; with less, a stage gives nothing worth having."""
PASSES = 16
"""Over a prompt in `evaluate`: six for the rows of the report, seven for 14 densities on half of the prompts, and what
selecting takes."""
FIRST_CHATS = 64
"""That `convert` reads for a first prior."""
SAMPLES = 12
"""Answers that `evaluate` puts into the report, six of them dense."""
BATCH = 4
"""Chats of a step. Many small steps do more for a head that begins with a regression than few large ones."""
_SHORT, _LONG = 144, 256  # most tokens of a chat
_FEW = 1000  # answers; with fewer, more prompts are worth more than longer answers
UNITS: Mapping[Stage, str] = {
    "answers": "answers",
    "calibrate": "chats",
    "select": "steps",
    "heal": "steps",
    "evaluate": "prompts",
}


@dataclass(frozen=True)
class Budget:
    """Seconds for the stages that are still to come.

    Args:
        hours: for all stages. A job that ends early does not spend those of the others, which may follow.
        least: seconds that the least of a stage takes. Where few hours make its share less, it gets so much.
    """

    hours: float
    least: Mapping[Stage, float] = field(default_factory=dict)

    @cached_property
    def parts(self) -> Mapping[Stage, float]:
        """Seconds of each stage, if none takes more."""
        short: dict[Stage, float] = {}
        while True:
            others = [stage for stage in STAGES if stage not in short]
            left = max(self.hours * 3600 - sum(short.values()), 0.0)
            parts = short | {stage: left * SHARES[stage] / sum(map(SHARES.__getitem__, others)) for stage in others}
            found = {stage: self.least.get(stage, 0.0) for stage in others if parts[stage] < self.least.get(stage, 0.0)}
            if not found:
                return parts
            short |= found

    def seconds(self, stage: Stage, spent: float) -> float:
        """For a stage that begins after `spent` seconds of the job: its share of what is left, so that what one stage
        takes too much, all others give; but the least of those behind it stays theirs."""
        coming = STAGES[STAGES.index(stage) :]
        left = max(self.hours * 3600 - spent, 0.0)
        share = left * self.parts[stage] / (sum(self.parts[name] for name in coming) or 1.0)
        return max(min(share, left - sum(self.least.get(name, 0.0) for name in coming[1:])), 0.0)

    def end(self, stage: Stage) -> float:
        """Seconds of the job by which a stage has to end, so that those behind it get their parts."""
        behind = STAGES[STAGES.index(stage) + 1 :]
        return max(self.hours * 3600 - sum(self.parts[name] for name in behind), 0.0)


def sized(stage: Stage, seconds: float, per_second: float) -> int:
    """How much of a stage fits into so many seconds at a measured rate, within its bounds."""
    least, most = BOUNDS[stage]
    return max(least, min(most, int(seconds * per_second)))


def planned(budget: Budget, flops: float, parameters: int, prompts: int) -> dict[Stage, int]:
    """How much of each stage there is likely to be time for.

    Args:
        budget: what the stages may take.
        flops: floating-point operations a second that this machine was measured to do in matrix products.
        parameters: of the model.
        prompts: that there are to answer.
    """
    costs = _costs(parameters)
    amounts = {stage: sized(stage, budget.parts[stage], flops / cost) for stage, cost in costs.items()}
    amounts["answers"] = min(amounts["answers"], prompts)
    amounts["calibrate"] = min(amounts["calibrate"], amounts["answers"])
    return amounts


def least_seconds(flops: float, parameters: int) -> dict[Stage, float]:
    """What the least of each stage is likely to take, as `planned` takes its arguments."""
    costs = _costs(parameters)
    least = {stage: BOUNDS[stage][0] * cost for stage, cost in costs.items()}
    least["convert"] = FIRST_CHATS * 2 * _chat(parameters)
    least["evaluate"] += SAMPLES * costs["answers"]
    return {stage: cost / flops for stage, cost in least.items()}


def longest_chat(hours: float, flops: float, parameters: int) -> int:
    """Most tokens of a chat, as `planned` takes its arguments."""
    answers = sized("answers", hours * 3600 * SHARES["answers"], flops / _costs(parameters)["answers"])
    return _SHORT if answers < _FEW else _LONG


def _costs(parameters: int) -> Mapping[Stage, float]:
    """Operations of one answer, chat, step or prompt. How far each stage stays below the rate of large products was
    measured with a model of 135M parameters (docs/log.md)."""
    chat = _chat(parameters)
    return {
        "answers": 6 * chat,
        "calibrate": 3 * chat,
        "select": BATCH * 2 * 3 * chat * 1.3,  # two arms, forwards and backwards
        "heal": BATCH * 2 * 3 * chat * 1.3,
        "evaluate": PASSES * chat * 1.8,
    }


def _chat(parameters: int) -> float:
    """Operations of one pass over a short chat."""
    return 150 * 2 * parameters


def plan_lines(
    budget: Budget,
    stages: Sequence[Stage],
    amounts: Mapping[Stage, int],
    needs: Mapping[Stage, Need],
    disk: int,
    model: str,
    room: int,
) -> list[str]:
    """The plan for a person, before anything is done.

    Args:
        budget: what the stages may take.
        amounts: of `planned`.
        needs: of each stage.
        disk: bytes that stages and result take at most.
        model: its size and the machine's rate, in words.
        room: bytes that weights may take here.
    """
    does: Mapping[Stage, str] = {
        "convert": "read the source, write a checkpoint, measure a first prior",
        "answers": "let the model answer prompts: what it will learn from",
        "calibrate": "measure which neurons the answers need",
        "distill": "fit a predictor to that",
        "select": "train predictor and fixed selection on the loss, weights held still",
        "heal": "train adapters for both selections",
        "evaluate": "compare on held-out prompts, measure densities, write the report",
    }
    memory = max(needs[stage].memory for stage in stages)
    lines = [
        f"plan: {budget.hours:g} h, {model}; up to {disk / 1e9:.1f} GB of disk, and {memory / 1e9:.1f} GB of memory "
        f"of the {room / 1e9:.1f} GB that weights may take"
    ]
    for stage in stages:
        amount = f"about {amounts[stage]} {UNITS[stage]}" if stage in amounts else ""
        gigabytes = f"{needs[stage].memory / 1e9:.1f} GB"
        lines.append(f"  {stage:10}{duration(budget.parts[stage]):>10} {gigabytes:>8}  {amount:20}  {does[stage]}")
    return lines


def duration(seconds: float) -> str:
    """A time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def machine_rate(now: Callable[[], float]) -> float:
    """Floating-point operations a second in float32 matrix products of a model's size, measured for about a second."""
    import mlx.core as mx

    size = 1024
    a = mx.random.normal((256, size))
    b = mx.random.normal((size, size))
    mx.eval(a, b, a @ b)
    start, count = now(), 0
    while now() - start < 1.0 and count < 20_000:
        mx.eval([a @ b for _ in range(4)])
        count += 4
    return count * 2 * 256 * size * size / max(now() - start, 1e-9)
