"""The Metal text of our kernel, compiled as C++ and run with real threads: that it is what the emulator runs.

Metal's own compiler is not to be had here. C++ sees slips of syntax and of scope, and reads every expression as Metal
does. What Metal adds to C++ stands in `metal_stubs.h`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.sparse.down_kernel import THREADS, DownKernel
from ifprune_mlx.sparse.kernel_text import metal
from tests.ifprune_mlx.sparse.emulated import FLOATS, activations, far, rows_of, unpacked_product

STUBS = Path(__file__).parent / "metal_stubs.h"
COMPILER = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)
CASES = [
    (DownKernel(576, mx.float16, Quantization(64, 4, "affine"), 1, 32), 100),
    (DownKernel(576, mx.float32, Quantization(32, 4, "affine"), 5, 8), 70),
    (DownKernel(640, mx.bfloat16, Quantization(128, 8, "affine"), 2, 16), 64),
    (DownKernel(576, mx.float16, None, 3, 8), 33),
    (DownKernel(264, mx.bfloat16, None, 1, 16), 40),
]
HEADER = "using namespace metal;\n"


def signature(kernel: DownKernel) -> str:
    """The function's head, as MLX's `write_signature` makes it."""
    kind = FLOATS[str(kernel.dtype).rpartition(".")[2]]
    types = [kind if name != "w" or kernel.packing is None else "uint32_t" for name in kernel.inputs]
    arguments = []
    for name, type_ in zip(kernel.inputs, types, strict=True):
        arguments.append(f"  const device {type_}* {name} [[buffer({len(arguments)})]]")
        if name == "x":
            arguments.append(f"  const constant int* x_shape [[buffer({len(arguments)})]]")
    arguments.append(f"  device {kind}* out [[buffer({len(arguments)})]]")
    for name in ("thread_position_in_threadgroup", "threadgroup_position_in_grid"):
        arguments.append(f"  uint3 {name} [[{name}]]")
    return "[[kernel]] void down(\n" + ",\n".join(arguments) + ") {\n"


def host(kernel: DownKernel) -> str:
    """A program that runs the kernel on the files `x`, `w`, `scales`, `biases` and writes `out`."""
    kind = FLOATS[str(kernel.dtype).rpartition(".")[2]]
    types = dict.fromkeys(kernel.inputs, kind) | ({} if kernel.packing is None else {"w": "uint32_t"})
    given = ", ".join(f'static_cast<const {types[name]}*>(contents("{name}"))' for name in kernel.inputs)
    first, _, rest = given.partition("), ")
    calls = f"{first}), shape, {rest}"
    return f"""
int main() {{
  int shape[2] = {{{kernel.tokens}, static_cast<int>(size_of("x") / sizeof({kind}) / {kernel.tokens})}};
  std::vector<{kind}> out({kernel.tokens * kernel.width}, {kind}(NAN));
  auto run = [&](uint3 one, uint3 group) {{ down({calls}, out.data(), one, group); }};
  dispatch({kernel.grid // THREADS}, {THREADS}, run);
  save("out", out.data(), out.size() * sizeof({kind}));
}}
"""


def raw(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler and pthread_barrier")
@pytest.mark.parametrize(("kernel", "k"), CASES, ids=str)
def test_the_text_compiles_as_cpp_and_computes_the_product(kernel: DownKernel, k: int, tmp_path: Path) -> None:
    x, arrays = activations(kernel, k), rows_of(kernel, k)
    for name, array in zip(kernel.inputs, [x, *arrays], strict=True):
        raw(array).tofile(tmp_path / name)
    text = f'#include "{STUBS}"\n{HEADER}{signature(kernel)}{metal(kernel.statements())}}}\n{host(kernel)}'
    (tmp_path / "kernel.cpp").write_text(text)
    quiet = ("-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-type-limits")
    strict = ("-std=c++14", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Wdouble-promotion", "-Werror", *quiet)
    command = [str(COMPILER), *strict, "kernel.cpp", "-o", "kernel", "-pthread"]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    subprocess.run([tmp_path / "kernel"], cwd=tmp_path, check=True, timeout=120)
    out = np.fromfile(tmp_path / "out", raw(x).dtype).reshape(kernel.tokens, kernel.width)
    found = np.array(mx.array(out).view(mx.bfloat16).astype(mx.float32)) if kernel.dtype == mx.bfloat16 else out
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 4e-3}[kernel.dtype]
    assert far(found, unpacked_product(x, arrays, kernel.packing)) <= tolerance


def test_the_text_uses_the_names_that_mlx_gives_it() -> None:
    """MLX looks for these in the text, and adds an argument for each that it finds."""
    text = metal(CASES[0][0].statements())
    attributes = ("thread_position_in_threadgroup", "threadgroup_position_in_grid")
    assert all(text.count(name) == 1 for name in (*attributes, "x_shape"))
    others = ("threads_per", "simdgroup_index", "thread_index", "grid_size", "thread_position_in_grid", "_strides")
    assert not any(name in text for name in (*others, "_ndim", "w_shape", "scales_shape", "biases_shape"))
