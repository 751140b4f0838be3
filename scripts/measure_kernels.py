"""Measures single FFN operations in the paper's shape: ways to lay out gate and up, to apply down, and to move rows.

    python -m scripts.measure_kernels            on Linux with OpenBLAS preloaded, or the figures say little
    python -m scripts.measure_kernels --one-token --rounds 25 --d-model 4096 --k 3840

Ways are timed in turn; printed are medians and the median of the ratios to the first way of each group, round by round.
For one token, every way multiplies by several matrices in turn, more than a processor's caches hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_mlx.sparse.inplace import exchange_rows, movable, shared

D_MODEL, D_FFN, K = 2048, 24576, 6656
ONE_TOKEN_BYTES = 1 << 28
Way = Callable[[], object]


def timed(ways: Mapping[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each way, and ratios to the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(value / base for value, base in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    }


def gate_and_up(rows: int) -> dict[str, Way]:
    """The first half of an FFN over the active prefix: as a plain model has it, and three layouts of ours."""
    gate, up = (0.02 * mx.random.normal((D_FFN, D_MODEL)) for _ in range(2))
    interleaved, halves = mx.stack([gate, up], axis=1), mx.stack([gate, up])
    plain = [mx.contiguous(array[:K] + 0) for array in (gate, up)]
    x = mx.random.normal((rows, D_MODEL))
    mx.eval(gate, up, interleaved, halves, plain, x)

    def one_matrix() -> None:
        both = (x @ interleaved[:K].reshape(2 * K, D_MODEL).T).reshape(rows, K, 2)
        mx.eval(both[..., 0] * both[..., 1])

    def batched() -> None:
        both = x[None] @ mx.swapaxes(halves[:, :K], 1, 2)
        mx.eval(both[0] * both[1])

    return {
        "plain model": lambda: mx.eval((x @ plain[0].T) * (x @ plain[1].T)),
        "two prefixes": lambda: mx.eval((x @ gate[:K].T) * (x @ up[:K].T)),
        "one matrix, interleaved": one_matrix,
        "one matrix, two halves": batched,
    }


def down(rows: int, bits: int | None) -> dict[str, Way]:
    """The second half: `[d_model, k]` as a plain model has it, and the neuron-major prefix."""
    weight = 0.02 * mx.random.normal((D_FFN, D_MODEL))
    turned = mx.contiguous(weight[:K].T)
    x = mx.random.normal((rows, K))
    mx.eval(weight, turned, x)
    if bits is None:
        return {"plain model": lambda: mx.eval(x @ turned.T), "neuron-major prefix": lambda: mx.eval(x @ weight[:K])}
    packed, plain = mx.quantize(weight, bits=bits), mx.quantize(turned, bits=bits)
    mx.eval(packed, plain)

    def ours() -> None:
        rows, scales, offsets = (array[:K] for array in packed)
        mx.eval(mx.quantized_matmul(x, rows, scales, offsets, transpose=False, bits=bits))

    def unpacked() -> None:
        rows, scales, offsets = (array[:K] for array in packed)
        mx.eval(x @ mx.dequantize(rows, scales, offsets, bits=bits))

    return {
        "plain model": lambda: mx.eval(mx.quantized_matmul(x, *plain, bits=bits)),
        "neuron-major prefix": ours,
        "neuron-major prefix, unpacked first": unpacked,
    }


def one_token(d_model: int, k: int, inwards: bool) -> dict[str, Way]:
    """One row by a plain model's matrix (twice: how far do equal ways differ), and by the prefix."""
    copies = max(2, ONE_TOKEN_BYTES // (4 * d_model * k))
    weights = [0.02 * mx.random.normal((k + 64, d_model)) for _ in range(copies)]
    plain = [mx.contiguous(array[:k] + 0 if inwards else array[:k].T) for array in weights]
    x = mx.random.normal((1, 1, d_model if inwards else k))
    mx.eval(weights, plain, x)

    def each(way: Callable[[mx.array], mx.array], arrays: list[mx.array]) -> Way:
        def run() -> None:
            for array in arrays:
                mx.eval(way(array))

        return run

    return {
        "plain model": each(lambda array: x @ array.T, plain),
        "plain model again": each(lambda array: x @ array.T, plain),
        "prefix": each(lambda array: x @ (array[:k].T if inwards else array[:k]), weights),
    }


def moved(count: int) -> dict[str, Way]:
    """Exchanging rows of one matrix: MLX's scatter, and the array's own buffer."""
    weight = mx.random.normal((D_FFN, D_MODEL))
    mx.eval(weight)
    generator = np.random.default_rng(0)
    held = {"array": weight}
    del weight

    def drawn() -> tuple[Any, Any]:
        one = np.sort(generator.choice(K, count, replace=False)).astype(np.int32)
        return one, np.sort(generator.choice(D_FFN - K, count, replace=False) + K).astype(np.int32)

    def scatter() -> None:
        one, other = drawn()
        target, origin = mx.array(np.concatenate([one, other])), mx.array(np.concatenate([other, one]))
        array = held.pop("array")
        array[target] = mx.take(array, origin, axis=0)
        mx.eval(array)
        held["array"] = array

    def in_place() -> None:
        exchange_rows(movable(held["array"]), *drawn())

    return {"scatter": scatter, "in place": in_place} if shared() else {"scatter": scatter}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--one-token", action="store_true", help="measure the products of one token alone")
    parser.add_argument("--d-model", type=int, default=D_MODEL, help="of the products of one token")
    parser.add_argument("--k", type=int, default=K, help="of the products of one token")
    arguments = parser.parse_args()
    d_model, k = arguments.d_model, arguments.k
    groups: dict[str, Callable[[], dict[str, Way]]] = {
        f"gate, 1 token by {k} of {d_model}": lambda: one_token(d_model, k, True),
        f"down, 1 token by {k} of {d_model}": lambda: one_token(d_model, k, False),
    }
    whole: dict[str, Callable[[], dict[str, Way]]] = {
        "gate and up, 1 token": lambda: gate_and_up(1),
        "gate and up, 1000 tokens": lambda: gate_and_up(1000),
        "down, 1000 tokens": lambda: down(1000, None),
        "down, 4 bit, 1 token": lambda: down(1, 4),
        "down, 4 bit, 64 tokens": lambda: down(64, 4),
        "exchange 1331 rows (80 % overlap)": lambda: moved(1331),
        "exchange 4853 rows (arbitrary selections)": lambda: moved(4853),
    }
    if not arguments.one_token:
        groups |= whole
    found = {}
    print("| | way | ms | ratio to the first |\n|---|---|---|---|")
    for name, make in groups.items():
        found[name] = timed(make(), arguments.rounds)
        mx.clear_cache()
        for way, figures in found[name].items():
            print(f"| {name} | {way} | {figures['ms']:.1f} | {figures['ratio']:.2f} |", flush=True)
    print(json.dumps({"written_in_place": shared(), "groups": found}))


if __name__ == "__main__":
    main()
