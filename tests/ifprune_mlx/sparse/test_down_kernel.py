"""Our kernel's description, run thread by thread, against the unpacked product. None of this is Metal's own word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.sparse.down_kernel import LANES, DownKernel, build, fits
from ifprune_mlx.sparse.kernel_text import Array, Barrier, For, If, Let, Set, Statements
from tests.ifprune_mlx.sparse.emulated import activations, emulated, far, numpy, rows_of, unpacked_product
from tests.ifprune_mlx.sparse.kernel_emulator import Emulator, RaceError

TOLERANCES = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 4e-3}  # bfloat16 itself rounds by up to 2^-8
FLOATS = tuple(TOLERANCES)
AFFINE = [Quantization(group, bits, "affine") for bits in (4, 8) for group in (32, 64, 128)]
PACKINGS = [*AFFINE, None]
WIDTHS = (576, 640, 2048, 3072)
Case = tuple[DownKernel, int]


def kernels() -> list[Case]:
    """Every packing with every number of tokens and every float type; the rest is drawn."""
    drawn = np.random.default_rng(0)
    cases: list[Case] = []
    for packing, tokens, dtype in product(PACKINGS, (1, 2, 3, 5), FLOATS):
        width, k, lanes = (int(drawn.choice(values)) for values in (WIDTHS, (64, 96, 257, 768, 1000, 1024), LANES))
        if packing is not None and width % packing.group_size:
            width = 640
        cases.append((DownKernel(width, dtype, packing, tokens, lanes), k))
    return cases


def many_rows() -> list[Case]:
    """The paper's number of neurons."""
    packings = (AFFINE[0], AFFINE[5], None)
    return [
        (DownKernel(width, dtype, packing, tokens, lanes), 6656)
        for (packing, dtype), (width, tokens, lanes) in product(
            zip(packings, FLOATS, strict=True), ((2048, 1, 32), (3072, 5, 8), (640, 2, 16))
        )
    ]


def named(case: Case) -> str:
    kernel, k = case
    packing = kernel.packing
    packed = "float" if packing is None else f"{packing.bits}bit-group{packing.group_size}"
    dtype = str(kernel.dtype).rpartition(".")[2]
    return f"{packed}-{dtype}-{kernel.tokens}x{k}x{kernel.width}-lanes{kernel.lanes}"


def error(case: Case, change: Callable[[Statements], Statements] = lambda statements: statements) -> float:
    kernel, k = case
    x, arrays = activations(kernel, k), rows_of(kernel, k)
    found = emulated(kernel, x, arrays, change(kernel.statements()))
    return far(found, unpacked_product(x, arrays, kernel.packing))


def test_there_are_enough_combinations() -> None:
    cases = kernels()
    assert len(cases) >= 60
    assert {kernel.width for kernel, _ in cases} == set(WIDTHS)
    assert {kernel.lanes for kernel, _ in cases} == set(LANES)
    assert any(kernel.width % kernel.tile for kernel, _ in cases)


@pytest.mark.parametrize("case", kernels(), ids=named)
def test_the_kernel_computes_the_unpacked_product(case: Case) -> None:
    assert error(case) <= TOLERANCES[case[0].dtype]


@pytest.mark.slow
@pytest.mark.parametrize("case", many_rows(), ids=named)
def test_the_kernel_computes_that_of_many_rows(case: Case) -> None:
    assert error(case) <= TOLERANCES[case[0].dtype]


@pytest.mark.skipif(not mx.metal.is_available(), reason="needs a Metal GPU")
@pytest.mark.parametrize("case", kernels()[::7], ids=named)
def test_metal_itself_computes_it(case: Case) -> None:
    kernel, k = case
    x, arrays = activations(kernel, k), rows_of(kernel, k)
    with mx.stream(mx.gpu):
        found = numpy(build(kernel)(x, *arrays))
    assert far(found, unpacked_product(x, arrays, kernel.packing)) <= TOLERANCES[kernel.dtype]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("width", [8, 24, 264])
def test_float_rows_of_any_multiple_of_8(width: int, lanes: int) -> None:
    """And fewer rows than groups of lanes."""
    case = DownKernel(width, mx.float32, None, 2, lanes), 5
    assert fits(width, mx.float32, None)
    assert error(case) <= 1e-5


def test_other_rows_are_left_to_mlx() -> None:
    assert fits(576, mx.bfloat16, Quantization(64, 4, "affine"))
    assert not fits(576, mx.float16, Quantization(32, 4, "mxfp4"))
    assert not fits(576, mx.float16, Quantization(64, 6, "affine"))
    assert not fits(574, mx.float16, None)
    assert not fits(576, mx.int32, None)


# A faulty kernel does not pass.


def rewritten(old: str, new: str, statement: type[Any]) -> Callable[[Statements], Statements]:
    """Replaces a text in every field of every statement of a type; complains if it is nowhere."""

    def change(statements: Statements) -> Statements:
        changed = tuple(walk(entry) for entry in statements)
        assert changed != statements, f"{old} is not in the kernel"
        return changed

    def walk(entry: Any) -> Any:
        new_values = {}
        for field in fields(entry):
            value = getattr(entry, field.name)
            if isinstance(value, tuple):
                new_values[field.name] = tuple(walk(inner) for inner in value)
            elif isinstance(value, str) and isinstance(entry, statement):
                new_values[field.name] = value.replace(old, new)
        return replace(entry, **new_values)

    return change


def without_barriers(statements: Statements) -> Statements:
    found: list[Any] = []
    for entry in statements:
        if isinstance(entry, (For, If)):
            found.append(replace(entry, body=without_barriers(entry.body)))
        elif not isinstance(entry, Barrier):
            found.append(entry)
    return tuple(found)


# 576 columns are two tiles of 256 and a quarter; 1000 rows are no multiple of 16.
FAULTS: dict[str, Callable[[Statements], Statements]] = {
    "guard of the columns dropped": rewritten("column < 576", "column < 768", If),
    "guard of the output dropped": rewritten("start + id < 576", "start + id < 768", If),
    "guard of the rows dropped": rewritten("k", "k + 16", For),
    "shift wrong": rewritten("c * 4", "c * 3", Let),
    "last partial lost": rewritten("16", "15", For),
    "stride of the words off": rewritten("row * 72", "row * 71", Let),
    "stride of the groups off": rewritten("row * 9 ", "row * 8 ", Let),
    "stride of the tokens off": rewritten("t * k", "t * (k + 1)", Let),
    "biases left out": rewritten("total[i] + offset[i / 8]", "total[i]", Set),
    "sums not set to nothing": rewritten("8", "7", For),
    "rows counted twice": rewritten("16", "8", For),
    "no barrier": without_barriers,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_noticed(fault: str) -> None:
    case = DownKernel(576, mx.float16, Quantization(64, 4, "affine"), 2, 32), 1000
    assert error(case) <= 2e-3
    try:
        found = error(case, FAULTS[fault])
    except (IndexError, RaceError):
        return
    assert not found <= 2e-3, f"the kernel with {fault} passes"


def test_a_shuffle_left_out_is_noticed() -> None:
    case = DownKernel(576, mx.float16, None, 1, 8), 100
    assert not error(case, rewritten(", 16)", ", 8)", Set)) <= 2e-3


@pytest.mark.parametrize(
    ("statements", "wrong"),
    [
        ((Set("out[id]", "x[id + 1]"),), IndexError),
        ((Set("out[id / 2]", "x[id]"),), RaceError),
        ((Array("s", 64, shared=True), Set("s[id]", "x[id]"), Set("out[id]", "s[63 - id]")), RaceError),
        ((Array("s", 64, shared=True), Set("s[id]", "x[id]"), Barrier(), Set("out[id]", "s[63 - id]")), None),
        ((If("id < 5", (Barrier(),)),), RaceError),
        ((Array("s", 64, shared=True), Set("out[id]", "s[id]")), None),
    ],
)
def test_the_emulator_sees_what_a_gpu_hides(statements: Statements, wrong: type[Exception] | None) -> None:
    out = np.zeros(64, np.float32)
    emulator = Emulator({"x": np.arange(64, dtype=np.float32), "out": out}, 64, 64)
    emulator.run((Let("uint", "id", "thread_position_in_threadgroup.x"),))
    if wrong is None:
        emulator.run(statements)
        assert np.isnan(out).all() or (out == np.arange(64)[::-1]).all()
    else:
        with pytest.raises(wrong):
            emulator.run(statements)
