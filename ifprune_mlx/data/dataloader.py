"""Endless mixtures of data sources, and their batches.

The seed, the data and the position fix every random choice. So a run that resumes, and one that several processes
share, see the batches that one undisturbed process sees.

    records = read_records("code.jsonl", "code", report=print)
    train = [record for record in records if split(record, 0.02) == "train"]
    mixture = DataMixture({"code": (encode_all(tokenizer, train, 512, print), 1.0), ...}, seed=0)
    for batch in batches(mixture, 32):
        ...
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import DataError


class Keyed(Protocol):
    """An item of a mixture: a record, or an example made of one."""

    @property
    def key(self) -> str: ...


Item = TypeVar("Item", bound=Keyed)


class DataMixture(Generic[Item]):
    """An endless stream that draws from several sources by weight. Each source is shuffled anew for every epoch.

    The next item comes from the source that is furthest behind its share. So every stretch of the stream holds the
    weights as nearly as whole items can, and the position is how many items each source has given.

    Args:
        sources: items and weight by name. Names matter to the shuffle; their order does not.
        seed: of the shuffles.

    Attributes:
        items: of the sources, by name in alphabetical order.

    Raises:
        DataError: if there are no sources, one is empty, or a weight is not above 0.
    """

    def __init__(self, sources: Mapping[str, tuple[Sequence[Item], float]], seed: int) -> None:
        if not sources:
            raise DataError("a mixture needs at least one source of data")
        for name, (items, weight) in sources.items():
            if not items:
                raise DataError(f"source {name!r} holds nothing to learn from; leave it out, or give it data")
            if not (weight > 0 and math.isfinite(weight)):
                raise DataError(f"source {name!r} has the weight {weight:g}; give a number above 0, or leave it out")
        self.items: dict[str, Sequence[Item]] = {name: sources[name][0] for name in sorted(sources)}
        total = sum(sources[name][1] for name in self.items)  # summed in this order, to the last bit
        self._shares = {name: sources[name][1] / total for name in self.items}
        self.seed = seed
        self._taken = dict.fromkeys(self.items, 0)
        self._orders: dict[str, tuple[int, npt.NDArray[np.intp]]] = {}

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        position = self.position + 1
        # `max` takes the first of equals, in the order of names.
        name = max(self.items, key=lambda name: self._shares[name] * position - self._taken[name])
        items = self.items[name]
        epoch, index = divmod(self._taken[name], len(items))
        if self._orders.get(name, (-1,))[0] != epoch:
            self._orders[name] = epoch, shuffled(len(items), f"{self.seed}/{name}/{epoch}")
        self._taken[name] += 1
        return items[int(self._orders[name][1][index])]

    @property
    def position(self) -> int:
        """Items given so far."""
        return sum(self._taken.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash (16 hexadecimal digits) of the seed, the shares, and the keys of all items in order."""
        digest = hashlib.sha256(json.dumps([self.seed, self._shares]).encode())
        for items in self.items.values():
            digest.update("\n".join(item.key for item in items).encode() + b"\0")
        return digest.hexdigest()[:16]

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        return {"taken": dict(self._taken), "fingerprint": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: if it was taken from another mixture: other data, weights or seed.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise DataError("the data, their weights or the seed changed since the run was saved; start a new run")
        self._taken = {name: int(state["taken"][name]) for name in self.items}


@dataclass(frozen=True, eq=False)
class Batch:
    """What one process computes of one step.

    Attributes:
        examples: this process's rows, in order of length if they come from a pool.
        targets: number of tokens to be predicted in the whole step, over all processes. A loss that sums over rows and
            divides by this is the one-process loss once summed over processes.
        state: give it to `batches` to go on after this step.
    """

    examples: tuple[Example, ...]
    targets: int
    state: dict[str, Any]


def batches(
    mixture: DataMixture[Example],
    size: int,
    *,
    rank: int = 0,
    world: int = 1,
    pool: int = 8,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Batch]:
    """Endless batches of `size` rows over all processes, of which this one gets every `world`-th row.

    So that rows of one batch have about one length, `pool` batches are drawn at once, sorted by length, cut, and given
    in shuffled order; the mixture's position fixes all of it. Every process draws the whole batch and keeps its rows,
    so the processes need not communicate.

    Args:
        size: rows of one step, a multiple of `world`.
        pool: 1 keeps the mixture's own order.
        state: of an earlier batch, made with the same data, `size` and `pool`; the rest may differ.

    Raises:
        DataError: if `size` is not a multiple of `world`, or `state` belongs to other data or other arguments.
    """
    if size < 1 or size % world:
        raise DataError(f"a batch of {size} cannot be shared equally by {world} processes; give a multiple of {world}")
    done = 0
    if state is not None:
        if state.get("shape") != [size, pool]:
            raise DataError("the batch size or pool changed since the run was saved; give those it began with")
        mixture.restore(state["mixture"])
        done = int(state["done"])
    return _batches(mixture, size, rank, world, pool, done)


def shuffled(count: int, seed: str) -> npt.NDArray[np.intp]:
    """A permutation of 0..count-1 that `seed` fixes on every machine.

    From a bit generator's raw output, which NumPy promises not to change (NEP 19), unlike `Generator.permutation`.
    """
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "big"))
    return np.argsort(bits.random_raw(count), kind="stable")


def _batches(mixture: DataMixture[Example], size: int, rank: int, world: int, pool: int, done: int) -> Iterator[Batch]:
    """`batches` with checked arguments; `done` batches of the first pool were given before."""
    while True:
        before, position = mixture.state(), mixture.position
        drawn = [next(mixture) for _ in range(size * pool)]
        if pool > 1:
            drawn.sort(key=lambda example: len(example.tokens))
        order = shuffled(pool, f"{mixture.seed}/pool/{position}")
        for index in range(done, pool):
            start = int(order[index]) * size
            rows = drawn[start : start + size]
            last = index + 1 == pool
            after = {
                "mixture": mixture.state() if last else before,
                "done": 0 if last else index + 1,
                "shape": [size, pool],
            }
            yield Batch(tuple(rows[rank::world]), sum(int(row.mask.sum()) for row in rows), after)
        done = 0
