"""Our Metal kernel for a few tokens times neuron-major rows: the down projection while tokens are decoded.

MLX's own kernels for this orientation read 32 bytes of a row at a time, and every row once per token. Ours reads rows
once for all tokens, and more of each at a time: a thread owns 8 columns, `lanes` neighbours read a row together, and
the threads of a group share the rows out and add up their sums, in float32, in the end. A narrow tile (few lanes)
makes more groups, which a large GPU needs to be busy.

It is described by the statements of `kernel_text`, which the tests run thread by thread. It has not run on a Mac: see
`down_product` for how it is tried before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.sparse.kernel_text import Array, Barrier, For, If, Let, Set, Statements, metal

MOST_TOKENS = 5
LANES = (32, 16, 8)
THREADS = 512
_SIMD = 32
_OWNED = 8
_TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}  # as MLX names them in Metal

Product = Callable[..., mx.array]
"""x `[tokens, k]` and the arrays of the rows -> `[tokens, width]`."""


@dataclass(frozen=True)
class DownKernel:
    """What one kernel is written for; the number of rows *k* is not fixed.

    Attributes:
        width: columns of a row, a multiple of 8.
        dtype: float type of x, of what the rows hold in floats, and of the product.
        packing: how the rows are packed, affine in 4 or 8 bits; None for float rows.
        tokens: rows of x.
        lanes: threads that read a row together, 8 to 32.
    """

    width: int
    dtype: mx.Dtype
    packing: Quantization | None
    tokens: int
    lanes: int

    @property
    def tile(self) -> int:
        """Columns of a threadgroup."""
        return _OWNED * self.lanes

    @property
    def grid(self) -> int:
        """Threads in all."""
        return -(-self.width // self.tile) * THREADS

    @property
    def inputs(self) -> list[str]:
        """The arrays it reads, by name."""
        return ["x", "w"] if self.packing is None else ["x", "w", "scales", "biases"]

    def statements(self) -> Statements:
        """What every thread does."""
        tokens, tile, sums = self.tokens, self.tile, self.tokens * _OWNED
        return (
            Let("uint", "id", "thread_position_in_threadgroup.x"),
            Let("uint", "lane", f"id % {self.lanes}"),
            Let("uint", "start", f"threadgroup_position_in_grid.x * {tile}"),
            Let("uint", "column", f"start + lane * {_OWNED}"),
            Let("uint", "k", "x_shape[1]"),
            Array("total", sums),
            Array("xs", tokens),
            Array("partial", THREADS // _SIMD * tile, shared=True),
            For("i", "0", f"{sums}", (Set("total[i]", "0"),)),
            *self._rows(),
            # Lanes of a simdgroup that own the same columns of different rows.
            *(
                For("i", "0", f"{sums}", (Set("total[i]", f"total[i] + simd_shuffle_xor(total[i], {distance})"),))
                for distance in (8, 16)
                if distance >= self.lanes
            ),
            For("t", "0", f"{tokens}", self._reduced()),
        )

    def _rows(self) -> Statements:
        """Sums up the thread's share of the rows, where it has columns."""
        tokens, rows = f"{self.tokens}", For("row", f"id / {self.lanes}", "k", self._row(), f"{THREADS // self.lanes}")
        guarded = If(f"column < {self.width}", (rows,))
        if self.packing is None:
            return (guarded,)
        return (
            Array("offset", self.tokens),
            For("t", "0", tokens, (Set("offset[t]", "0"),)),
            guarded,
            For("i", "0", f"{self.tokens * _OWNED}", (Set("total[i]", f"total[i] + offset[i / {_OWNED}]"),)),
        )

    def _row(self) -> Statements:
        """Adds one row times every token's activation to the thread's sums."""
        packing = self.packing
        if packing is None:
            load = For("t", "0", f"{self.tokens}", (Set("xs[t]", "float(x[t * k + row])"),))
            value = Let("float", "value", f"float(w[row * {self.width} + column + c])")
            return (load, For("c", "0", f"{_OWNED}", (value, self._add("c"))))
        word, groups = 32 // packing.bits, self.width // packing.group_size
        return (
            Let("uint", "group", f"row * {groups} + column / {packing.group_size}"),
            Let("float", "scale", "float(scales[group])"),
            Let("float", "bias", "float(biases[group])"),
            # A thread's columns are of one group: its scale goes to x, and its bias to a sum that all columns share.
            For(
                "t",
                "0",
                f"{self.tokens}",
                (
                    Let("float", "one", "float(x[t * k + row])"),
                    Set("offset[t]", "fma(one, bias, offset[t])"),
                    Set("xs[t]", "one * scale"),
                ),
            ),
            For(
                "h",
                "0",
                f"{_OWNED // word}",
                (
                    Let("uint", "word", f"w[row * {self.width // word} + column / {word} + h]"),
                    For(
                        "c",
                        "0",
                        f"{word}",
                        (
                            Let("float", "value", f"float((word >> (c * {packing.bits})) & {2**packing.bits - 1})"),
                            self._add(f"h * {word} + c"),
                        ),
                    ),
                ),
            ),
        )

    def _add(self, column: str) -> For:
        total = f"total[t * {_OWNED} + {column}]"
        return For("t", "0", f"{self.tokens}", (Set(total, f"fma(xs[t], value, {total})"),))

    def _reduced(self) -> Statements:
        """Adds up the sums of token t over the simdgroups, and writes them."""
        place = f"partial[id / {_SIMD} * {self.tile} + lane * {_OWNED} + c]"
        return (
            If(
                f"id % {_SIMD} < {self.lanes}",
                (For("c", "0", f"{_OWNED}", (Set(place, f"total[t * {_OWNED} + c]"),)),),
            ),
            Barrier(),
            If(
                f"id < {self.tile}",
                (
                    If(
                        f"start + id < {self.width}",
                        (
                            Let("float", "sum", "0"),
                            For("g", "0", f"{THREADS // _SIMD}", (Set("sum", f"sum + partial[g * {self.tile} + id]"),)),
                            Set(f"out[t * {self.width} + start + id]", f"{_TYPES[self.dtype]}(sum)"),
                        ),
                    ),
                ),
            ),
            Barrier(),  # the next token's sums take the same place
        )


def build(kernel: DownKernel) -> Product:
    """The kernel as MLX runs it; it is compiled when a result is first computed, which may raise."""
    packed = "" if kernel.packing is None else f"_{kernel.packing.bits}bit_{kernel.packing.group_size}"
    run: Any = mx.fast.metal_kernel(
        name=f"ifprune_down{packed}_{kernel.width}_{kernel.tokens}_{kernel.lanes}",
        input_names=kernel.inputs,
        output_names=["out"],
        source=metal(kernel.statements()),
    )

    def product(*arrays: mx.array) -> mx.array:
        out: list[mx.array] = run(
            inputs=list(arrays),
            grid=(kernel.grid, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(kernel.tokens, kernel.width)],
            output_dtypes=[kernel.dtype],
        )
        return out[0]

    return product


def fits(width: int, dtype: mx.Dtype, packing: Quantization | None) -> bool:
    """Whether there is a kernel for such rows."""
    if width % _OWNED or dtype not in _TYPES:
        return False
    return packing is None or (
        packing.mode == "affine" and packing.bits in (4, 8) and packing.group_size in (32, 64, 128)
    )
