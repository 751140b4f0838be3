"""Runs the statements of a kernel as a GPU would, every thread of every threadgroup, in NumPy.

All threads take each statement together; where a condition or a loop leaves some out, these are masked. What a GPU
would do silently is an error here: reading or writing outside an array, two threads touching the same element of a
shared array with no barrier between, or of the output, a barrier or a shuffle that not all threads reach. Memory that
nobody wrote is not a number.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_mlx.sparse.kernel_text import Array, Barrier, For, If, Let, Set, Statements

SIMD = 32
Values = Any
"""A NumPy scalar that all threads share, or an array `[threadgroups, threads]`."""
Mask = Any
"""Which threads run, bool `[threadgroups, threads]`; None for all."""


class RaceError(Exception):
    """The result would depend on which thread comes first."""


def rounded(values: Values, dtype: str) -> Values:
    """Floats as a GPU keeps them in that type; bfloat16 in float32, which holds its values."""
    values = np.asarray(values, np.float32)
    if dtype == "bfloat16_t":
        return np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32))
    return values.astype(np.float16) if dtype == "float16_t" else values


@cache
def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


class Emulator:
    """One run of a kernel.

    Args:
        arrays: what it may read or write, by name, flat or not.
        grid, threads: of one dimension: threads in all and of a threadgroup.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], grid: int, threads: int) -> None:
        self.groups, self.threads = grid // threads, threads
        shape = (self.groups, threads)
        self.id = np.broadcast_to(np.arange(threads, dtype=np.uint32), shape)
        self.group = np.broadcast_to(np.arange(self.groups, dtype=np.uint32)[:, None], shape)
        self.names: dict[str, Values] = {
            "thread_position_in_threadgroup.x": self.id,
            "threadgroup_position_in_grid.x": self.group,
        }
        self.device = {name: array.reshape(-1) for name, array in arrays.items()}
        self.written = {name: np.zeros(array.size, bool) for name, array in self.device.items()}
        self.own: dict[str, np.ndarray] = {}
        self.shared: dict[str, np.ndarray] = {}
        # Since the last barrier, by element: the thread that touched it (-1: none, -2: several), and whether one wrote.
        self.touched: dict[str, np.ndarray] = {}
        self.dirty: dict[str, np.ndarray] = {}

    def run(self, statements: Statements, mask: Mask = None) -> None:
        for statement in statements:
            if isinstance(statement, Let):
                value = self.value(statement.value, mask)
                self.names[statement.name] = self.typed(statement.type, value)
            elif isinstance(statement, Array):
                self.declare(statement)
            elif isinstance(statement, Set):
                self.set(statement.target, self.value(statement.value, mask), mask)
            elif isinstance(statement, If):
                inner = self.narrowed(mask, self.value(statement.condition, mask))
                if inner is None or inner.any():
                    self.run(statement.body, inner)
            elif isinstance(statement, For):
                self.loop(statement, mask)
            else:
                assert isinstance(statement, Barrier)
                if mask is not None:
                    raise RaceError("a barrier that some threads do not reach")
                for name in self.shared:
                    self.touched[name][:] = -1
                    self.dirty[name][:] = False

    def loop(self, statement: For, mask: Mask) -> None:
        value = self.typed("uint", self.value(statement.start, mask))
        while True:
            self.names[statement.name] = value
            inner = self.narrowed(mask, value < self.value(statement.stop, mask))
            if inner is not None and not inner.any():
                return
            self.run(statement.body, inner)
            value = value + self.typed("uint", self.value(statement.step, mask))

    def declare(self, array: Array) -> None:
        if array.shared:
            shape = (self.groups, array.size)
            self.shared[array.name] = np.full(shape, np.nan, np.float32)
            self.touched[array.name] = np.full(shape, -1)
            self.dirty[array.name] = np.zeros(shape, bool)
        else:
            self.own[array.name] = np.full((array.size, self.groups, self.threads), np.nan, np.float32)

    def narrowed(self, mask: Mask, condition: Values) -> Mask:
        condition = np.broadcast_to(condition, (self.groups, self.threads))
        inner = condition if mask is None else mask & condition
        return None if inner.all() else inner

    @staticmethod
    def typed(kind: str, value: Values) -> Values:
        return np.asarray(value).astype({"uint": np.uint32, "float": np.float32}[kind])[()]

    # Expressions.

    def value(self, text: str, mask: Mask) -> Values:
        return self.node(parsed(text), mask)

    def node(self, node: ast.expr, mask: Mask) -> Values:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.names[ast.unparse(node)]
        if isinstance(node, ast.BinOp):
            return self.binary(node.op, self.node(node.left, mask), self.node(node.right, mask))
        if isinstance(node, ast.Compare):
            (other,) = node.comparators
            assert isinstance(node.ops[0], ast.Lt)
            return np.less(self.node(node.left, mask), self.node(other, mask))
        if isinstance(node, ast.Subscript):
            assert isinstance(node.value, ast.Name)
            return self.load(node.value.id, self.node(node.slice, mask), mask)
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        return self.call(node.func.id, [self.node(argument, mask) for argument in node.args], mask)

    @staticmethod
    def binary(operator: ast.operator, one: Values, other: Values) -> Values:
        floats = any(np.asarray(value).dtype.kind == "f" for value in (one, other))
        operations: dict[type[ast.operator], Callable[[Values, Values], Values]] = {
            ast.Add: np.add,
            ast.Sub: np.subtract,
            ast.Mult: np.multiply,
            ast.Div: np.divide if floats else np.floor_divide,
            ast.Mod: np.mod,
            ast.RShift: np.right_shift,
            ast.BitAnd: np.bitwise_and,
        }
        return operations[type(operator)](one, other)

    def call(self, name: str, values: list[Values], mask: Mask) -> Values:
        if name == "fma":
            return values[0] * values[1] + values[2]
        if name == "simd_shuffle_xor":
            if mask is not None:
                raise RaceError("a shuffle that some threads do not reach")
            return values[0][:, np.arange(self.threads) ^ values[1]]
        return rounded(values[0], name)

    # Memory.

    def load(self, name: str, index: Values, mask: Mask) -> Values:
        if name in self.own:
            return self.own[name][int(index)]
        if name in self.device:
            return self.device[name][self.bounded(name, index, len(self.device[name]), mask)]
        flat = self.touch(name, index, mask, write=False)
        return self.shared[name].reshape(-1)[flat]

    def set(self, target: str, value: Values, mask: Mask) -> None:
        node = parsed(target)
        if isinstance(node, ast.Name):
            old = self.names[node.id]
            self.names[node.id] = np.float32(value) if mask is None else np.where(mask, value, old).astype(np.float32)
            return
        assert isinstance(node, ast.Subscript)
        assert isinstance(node.value, ast.Name)
        name, index = node.value.id, self.node(node.slice, mask)
        if name in self.own:
            np.copyto(self.own[name][int(index)], value, where=True if mask is None else mask)
            return
        where = np.ones((self.groups, self.threads), bool) if mask is None else mask
        values = np.broadcast_to(value, where.shape)[where]
        if name in self.shared:
            flat = self.touch(name, index, mask, write=True)
            self.shared[name].reshape(-1)[flat[where]] = values
            return
        places = np.broadcast_to(self.bounded(name, index, len(self.device[name]), mask), where.shape)[where]
        if len(np.unique(places)) < len(places) or self.written[name][places].any():
            raise RaceError(f"two threads write the same element of {name}")
        self.written[name][places] = True
        self.device[name][places] = values

    def bounded(self, name: str, index: Values, size: int, mask: Mask) -> Values:
        """The index, 0 for threads that do not run; an error if it is outside."""
        if mask is not None:
            index = np.where(mask, index, 0)
        if not (np.asarray(index) < size).all():
            raise IndexError(f"{name}[{np.max(index)}], of {size}")
        return index

    def touch(self, name: str, index: Values, mask: Mask, *, write: bool) -> np.ndarray:
        """Flat places in a shared array. Notes who was there, and complains if another was before."""
        size = self.shared[name].shape[1]
        inside = self.bounded(name, np.broadcast_to(index, self.id.shape), size, mask)
        flat = self.group.astype(np.int64) * size + inside
        where = slice(None) if mask is None else mask
        places, ids = flat[where].reshape(-1), self.id[where].reshape(-1).astype(np.int64)
        touched, dirty = self.touched[name].reshape(-1), self.dirty[name].reshape(-1)
        others = (touched[places] != -1) & (touched[places] != ids)
        if (others & (dirty[places] | write)).any() or (write and len(np.unique(places)) < len(places)):
            raise RaceError(f"threads meet in {name} with no barrier between")
        before = touched[places]
        touched[places] = np.where((before == -1) | (before == ids), ids, -2)
        if write:
            dirty[places] = True
        return flat
