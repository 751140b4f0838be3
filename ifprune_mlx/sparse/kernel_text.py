"""The statements that our kernel consists of, and how they are printed as Metal.

A kernel is a tuple of statements. Their expressions are text in what C++ and Python have in common (`row * 8 + lane`,
`(word >> 4) & 15`, `float(x[i])`), so that printing copies them and the tests' emulator can run them: no Mac is at hand
where this is developed. `and`, `%` of negative numbers and everything else that the two languages read differently is
left out. All numbers are of type uint, float, or the float type of the arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Union


@dataclass(frozen=True)
class Let:
    """A variable of a thread, set once or changed later by `Set`."""

    type: str
    name: str
    value: str


@dataclass(frozen=True)
class Array:
    """Floats of a thread, or, if shared, of its threadgroup."""

    name: str
    size: int
    shared: bool = False


@dataclass(frozen=True)
class Set:
    """What a variable, or an element of any array, becomes."""

    target: str
    value: str


@dataclass(frozen=True)
class For:
    """`name` goes from `start` to before `stop` by `step`."""

    name: str
    start: str
    stop: str
    body: tuple[Statement, ...]
    step: str = "1"


@dataclass(frozen=True)
class If:
    """Threads for which the condition is false skip the body."""

    condition: str
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Barrier:
    """All threads of a threadgroup meet here, and see what the others wrote to shared arrays before."""


Statement = Union[Let, Array, Set, For, If, Barrier]
Statements = tuple[Statement, ...]


def metal(statements: Statements) -> str:
    """The body of a Metal function."""
    return "\n".join(_lines(statements, "  ")) + "\n"


def _lines(statements: Statements, indent: str) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, Let):
            yield f"{indent}{statement.type} {statement.name} = {statement.value};"
        elif isinstance(statement, Array):
            yield f"{indent}{'threadgroup ' if statement.shared else ''}float {statement.name}[{statement.size}];"
        elif isinstance(statement, Set):
            yield f"{indent}{statement.target} = {statement.value};"
        elif isinstance(statement, For):
            # Without unrolling, a thread's arrays would not be in registers; elsewhere it has loads under way at once.
            how = "unroll(full)" if statement.stop.isdigit() else "unroll_count(4)"
            name, stop = statement.name, statement.stop
            yield f"{indent}#pragma clang loop {how}"
            yield f"{indent}for (uint {name} = {statement.start}; {name} < {stop}; {name} += {statement.step}) {{"
            yield from _lines(statement.body, indent + "  ")
            yield f"{indent}}}"
        elif isinstance(statement, If):
            yield f"{indent}if ({statement.condition}) {{"
            yield from _lines(statement.body, indent + "  ")
            yield f"{indent}}}"
        else:
            yield f"{indent}threadgroup_barrier(mem_flags::mem_threadgroup);"
