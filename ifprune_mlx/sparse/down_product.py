"""The down product: by our kernel where it was found right and faster than MLX's here, else by MLX's.

When a model is opened on a Metal GPU, `choose` tries the kernel on made-up rows of the model's shape, for one token to
five. A kernel that does not compile, computes wrongly, or is slower is not kept, and the log says so.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ifprune_mlx.checkpoint.budget import resolve_keep
from ifprune_mlx.checkpoint.format import Checkpoint, Quantization
from ifprune_mlx.errors import IfpruneError, reason_of
from ifprune_mlx.sparse.down_kernel import LANES, MOST_TOKENS, DownKernel, Product, build, fits
from ifprune_mlx.sparse.quantized import FLOATS, neuron_major_matmul

KERNELS = "IFPRUNE_KERNELS"
OWN, MLX = "ifprune", "mlx"

# Of the largest result, by the type's precision; a sum that misses rows or columns is further off.
_TOLERANCES = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}
# Several copies of the rows are multiplied in turn, so that they come from memory, as in a model of many layers.
_COPIED_BYTES, _MOST_COPIES = 1 << 26, 16
_ROUNDS = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which kernel computes down products of one number of tokens, OWN or MLX, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class _Rows:
    """The rows that a choice is for: it is made once in a process."""

    packing: Quantization | None
    width: int
    dtype: mx.Dtype


_kept: dict[tuple[_Rows, int], Product] = {}
_chosen: dict[_Rows, dict[int, Choice]] = {}


def own_product(x: mx.array, rows: Callable[[str], mx.array | None], packing: Quantization | None) -> mx.array | None:
    """`x @ rows` by our kernel, for x `[..., k]` and the down rows of k neurons: `[..., d_model]`. It has no gradient.

    Args:
        rows: gives the array `[k, ...]` of that name, such as `down.weight`.

    Returns:
        None where MLX's kernel was chosen, or none was.
    """
    if not _kept or not _on_metal():  # none is kept but on Metal
        return None
    parts = ("weight",) if packing is None else packing.parts
    arrays = [array for part in parts if (array := rows(f"down.{part}")) is not None]
    tokens, width = x.size // x.shape[-1], arrays[0].shape[-1] * (1 if packing is None else 32 // packing.bits)
    own = _kept.get((_Rows(packing, width, arrays[-1].dtype), tokens))
    if own is None or x.dtype != arrays[-1].dtype:
        return None
    return own(x.reshape(tokens, -1), *arrays).reshape(*x.shape[:-1], width)


def choose(checkpoint: Checkpoint, dtype: mx.Dtype | None = None) -> dict[int, Choice]:
    """Choose the kernel for each number of tokens, by trial where that is possible.

    Args:
        dtype: float type that the weights are cast to; None keeps the checkpoint's.

    Returns:
        The choice for each number of tokens.

    Raises:
        IfpruneError: if IFPRUNE_KERNELS is set to anything but `mlx`.
    """
    wish = os.environ.get(KERNELS, "")
    if wish not in ("", MLX):
        raise IfpruneError(f"{KERNELS} is {wish!r}; set it to {MLX}, which keeps to MLX's own kernels, or not at all")
    packing, width = checkpoint.layout.down, checkpoint.layout.ffns[0].d_model  # of all FFNs: their outputs are added
    name = "down.weight" if packing is None else "down.scales"
    stored = next(part.dtype for strip in checkpoint.strips(0) for part in strip.parts if part.name == name)
    rows = _Rows(packing, width, dtype or FLOATS.get(stored, mx.float32))
    if wish == MLX:
        return _all_mlx(f"{KERNELS} is {MLX}")
    if not _on_metal():
        return _all_mlx("there is no Metal GPU")
    if not fits(width, rows.dtype, packing):
        return _all_mlx("ours is not written for such rows")
    if rows not in _chosen:
        _chosen[rows] = _tried(rows, max(resolve_keep(checkpoint)))  # the widest FFN takes the most time
    return _chosen[rows]


def _all_mlx(reason: str) -> dict[int, Choice]:
    return dict.fromkeys(range(1, MOST_TOKENS + 1), Choice(MLX, reason))


def _on_metal() -> bool:
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def _tried(rows: _Rows, k: int) -> dict[int, Choice]:
    """The choices for rows of k neurons. The width of the tile is decided with one token."""
    start = time.perf_counter()
    copies = list(_made_up_rows(rows, k))
    choices: dict[int, Choice] = {}
    lanes: Sequence[int] = LANES
    for tokens in range(1, MOST_TOKENS + 1):
        x = mx.random.normal((tokens, k), key=mx.random.key(tokens)).astype(rows.dtype)
        mx.eval(x)
        wanted = _unpacked_product(x, copies[0], rows.packing)
        right: dict[int, Product] = {}
        for width in lanes:
            own, fault = _right(DownKernel(rows.width, rows.dtype, rows.packing, tokens, width), x, copies[0], wanted)
            if own is None:
                _log.warning("our kernel for down products is not used for %d or more tokens: it %s", tokens, fault)
                break
            right[width] = own
        else:
            choices[tokens], lanes = _faster(rows, x, copies, right)
            continue
        # What fails once need not be compiled and reported again.
        choices |= dict.fromkeys(range(tokens, MOST_TOKENS + 1), Choice(MLX, f"ours {fault}"))
        break
    del copies
    mx.clear_cache()
    _log.debug("down products: %s, in %.2f s", choices, time.perf_counter() - start)
    return choices


def _right(kernel: DownKernel, x: mx.array, arrays: Sequence[mx.array], wanted: mx.array) -> tuple[Product | None, str]:
    """The kernel, if it computes as it should; else what is wrong with it."""
    try:
        own = build(kernel)
        found = own(x, *arrays).astype(mx.float32)
        far = float(mx.abs(found - wanted).max()) / float(mx.abs(wanted).max())
    except Exception as exc:  # Metal's compiler, or a GPU that cannot run so many threads
        return None, f"fails ({reason_of(exc)})"
    if not far <= _TOLERANCES[kernel.dtype]:  # also if it is not a number
        return None, f"is wrong by {far:.2g} of the largest result"
    return own, ""


def _faster(
    rows: _Rows, x: mx.array, copies: Sequence[Sequence[mx.array]], right: dict[int, Product]
) -> tuple[Choice, list[int]]:
    """Time the kernels, by their lanes, and MLX's in turn; keep the fastest of ours if it is faster, and name it."""

    def plain(x: mx.array, *arrays: mx.array) -> mx.array:
        if rows.packing is None:
            return x @ arrays[0]
        weight, scales, biases = arrays
        return neuron_major_matmul(x, weight, scales, biases, rows.packing)

    ways: dict[int, Product] = {0: plain, **right}
    seconds: dict[int, list[float]] = {lanes: [] for lanes in ways}
    for round_ in range(_ROUNDS + 1):
        for lanes, way in ways.items():
            start = time.perf_counter()
            mx.eval([way(x, *arrays) for arrays in copies])
            if round_:  # the first one warms up
                seconds[lanes].append((time.perf_counter() - start) / len(copies))
    medians = {lanes: statistics.median(values) for lanes, values in seconds.items()}
    by_mlx = medians.pop(0)
    best = min(medians, key=medians.__getitem__)
    is_faster = medians[best] < by_mlx
    if is_faster:
        _kept[rows, x.shape[0]] = right[best]
    figures = f"{1e6 * medians[best]:.0f} us with tiles of {8 * best} columns, MLX's {1e6 * by_mlx:.0f} us"
    return Choice(OWN if is_faster else MLX, f"ours takes {figures}"), [best]


def _made_up_rows(rows: _Rows, k: int) -> Iterator[list[mx.array]]:
    """Copies of k random rows, as the model has them: weight, and scales and biases."""
    packing, done = rows.packing, 0
    for index in range(_MOST_COPIES):
        keys = mx.random.split(mx.random.key(index), 2)
        if packing is None:
            arrays = [mx.random.normal((k, rows.width), rows.dtype, key=keys[0])]
        else:
            levels, row_bytes = 2**packing.bits, rows.width * packing.bits // 8
            weight = mx.random.randint(0, 256, (k, row_bytes), mx.uint8, key=keys[0]).view(mx.uint32)
            scales = mx.random.uniform(1 / levels, 4 / levels, (k, rows.width // packing.group_size), key=keys[1])
            arrays = [weight, scales.astype(rows.dtype), (scales * (-levels / 2)).astype(rows.dtype)]
        mx.eval(arrays)
        yield arrays
        done += sum(array.nbytes for array in arrays)
        if index and done > _COPIED_BYTES:
            return


def _unpacked_product(x: mx.array, arrays: Sequence[mx.array], packing: Quantization | None) -> mx.array:
    """In float32 on the CPU, where no kernel of a GPU has a part in it."""
    weight, *rest = arrays
    if packing is not None:
        scales, biases = (array.astype(mx.float32, stream=mx.cpu) for array in rest)
        weight = mx.dequantize(weight, scales, biases, **packing.to_dict(), stream=mx.cpu)
    x, weight = (array.astype(mx.float32, stream=mx.cpu) for array in (x, weight))
    wanted = mx.matmul(x, weight, stream=mx.cpu)
    mx.eval(wanted)
    return wanted
