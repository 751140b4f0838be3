"""How a budget of hours is divided over the stages, and how much of each fits into its part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    """

    hours: float

    def seconds(self, stage: Stage, spent: float) -> float:
        """For a stage that begins after `spent` seconds of the job: its share of what is left, so that what one stage
        takes too much, all others give."""
        coming = STAGES[STAGES.index(stage) :]
        left = max(self.hours * 3600 - spent, 0.0)
        return left * SHARES[stage] / sum(SHARES[name] for name in coming)

    def end(self, stage: Stage) -> float:
        """Seconds of the job by which a stage has to end, so that those behind it get their shares."""
        behind = STAGES[STAGES.index(stage) + 1 :]
        return self.hours * 3600 * (1 - sum(SHARES[name] for name in behind))


def sized(stage: Stage, seconds: float, per_second: float) -> int:
    """How much of a stage fits into so many seconds at a measured rate, within its bounds."""
    least, most = BOUNDS[stage]
    return max(least, min(most, int(seconds * per_second)))


def planned(hours: float, flops: float, parameters: int, prompts: int) -> dict[Stage, int]:
    """How much of each stage there is likely to be time for.

    Args:
        flops: floating-point operations a second that this machine was measured to do in matrix products.
        parameters: of the model.
        prompts: that there are to answer.
    """
    costs = _costs(parameters)
    amounts = {stage: sized(stage, hours * 3600 * SHARES[stage], flops / cost) for stage, cost in costs.items()}
    amounts["answers"] = min(amounts["answers"], prompts)
    amounts["calibrate"] = min(amounts["calibrate"], amounts["answers"])
    return amounts


def least_seconds(stages: Sequence[Stage], flops: float, parameters: int) -> float:
    """What the least of these stages is likely to take, as `planned` takes its arguments."""
    costs = _costs(parameters)
    return sum(BOUNDS[stage][0] * costs[stage] / flops for stage in stages if stage in costs)


def longest_chat(hours: float, flops: float, parameters: int) -> int:
    """Most tokens of a chat, as `planned` takes its arguments."""
    answers = sized("answers", hours * 3600 * SHARES["answers"], flops / _costs(parameters)["answers"])
    return _SHORT if answers < _FEW else _LONG


def _costs(parameters: int) -> Mapping[Stage, float]:
    """Operations of one answer, chat, step or prompt. How far each stage stays below the rate of large products was
    measured with a model of 135M parameters (docs/log.md)."""
    chat = 150 * 2 * parameters  # one pass over a short chat
    return {
        "answers": 6 * chat,
        "calibrate": 3 * chat,
        "select": BATCH * 2 * 3 * chat * 1.3,  # two arms, forwards and backwards
        "heal": BATCH * 2 * 3 * chat * 1.3,
        "evaluate": PASSES * chat * 1.8,
    }


def plan_lines(
    hours: float,
    stages: Sequence[Stage],
    amounts: Mapping[Stage, int],
    needs: Mapping[Stage, Need],
    disk: int,
    model: str,
    room: int,
) -> list[str]:
    """The plan for a person, before anything is done.

    Args:
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
        f"plan: {hours:g} h, {model}; up to {disk / 1e9:.1f} GB of disk, and {memory / 1e9:.1f} GB of memory of the "
        f"{room / 1e9:.1f} GB that weights may take"
    ]
    for stage in stages:
        seconds = hours * 3600 * SHARES[stage]
        amount = f"about {amounts[stage]} {UNITS[stage]}" if stage in amounts else ""
        gigabytes = f"{needs[stage].memory / 1e9:.1f} GB"
        lines.append(f"  {stage:10}{duration(seconds):>10} {gigabytes:>8}  {amount:20}  {does[stage]}")
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
