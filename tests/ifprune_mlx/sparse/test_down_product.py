"""Which kernel computes down products. Stand-ins take the place of Metal's, on this machine's CPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, IfpruneError
from ifprune_mlx.sparse import down_product
from ifprune_mlx.sparse.down_kernel import LANES, DownKernel, Product, build
from ifprune_mlx.sparse.down_product import KERNELS, MLX, OWN, choose
from tests.cli.process import run_here
from tests.family_configs import OVERRIDES, write_family
from tests.ifprune_mlx.generating import TOKENS, A
from tests.ifprune_mlx.reference import open_model
from tests.ifprune_mlx.sparse.emulated import build_emulated
from tests.tiny import write_checkpoint

ALL_TOKENS = [1, 2, 3, 4, 5]
Build = Callable[[DownKernel], Product]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = Options(quantization=quantization_of("affine", 64, 4))
    return write_checkpoint(tmp_path_factory.mktemp("kernel") / "packed", options=options)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(KERNELS, raising=False)
    down_product._kept.clear()
    down_product._chosen.clear()
    yield
    down_product._kept.clear()
    down_product._chosen.clear()


class Clock:
    """Stands in for `time`: only what `slowed` runs takes any."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slowed(self, product: Callable[..., mx.array], seconds: float) -> Callable[..., mx.array]:
        def run(*given: Any) -> mx.array:
            self.now += seconds
            return product(*given)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(down_product, "time", clock)
    return clock


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[DownKernel]:
    """As if there were a Metal GPU, on which our kernel takes no time and MLX's 1 s; the kernels that were run."""
    ran: list[DownKernel] = []

    def quick(kernel: DownKernel) -> Product:
        product = unpacked(kernel)

        def run(*given: mx.array) -> mx.array:
            ran.append(kernel)
            return product(*given)

        return run

    monkeypatch.setattr(down_product, "_on_metal", lambda: True)
    monkeypatch.setattr(down_product, "_COPIED_BYTES", 1)
    monkeypatch.setattr(down_product, "build", quick)
    monkeypatch.setattr(down_product, "neuron_major_matmul", clock.slowed(down_product.neuron_major_matmul, 1))
    return ran


def unpacked(kernel: DownKernel) -> Product:
    """What our kernel should compute."""

    def product(x: mx.array, weight: mx.array, *rest: mx.array) -> mx.array:
        if kernel.packing is not None:
            weight = mx.dequantize(weight, *rest, **kernel.packing.to_dict())
        return (x.astype(mx.float32) @ weight.astype(mx.float32)).astype(kernel.dtype)

    return product


def made(breaks: Callable[[DownKernel, mx.array], mx.array]) -> Build:
    """Builds kernels whose result is changed."""
    return lambda kernel: lambda *given: breaks(kernel, unpacked(kernel)(*given))


def refuse(kernel: DownKernel) -> Product:
    """Metal's compiler speaks when a result is computed."""

    def product(*_: mx.array) -> mx.array:
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: expected ';'")

    return product


def halved(kernel: DownKernel, y: mx.array) -> mx.array:
    return mx.where(mx.arange(y.shape[-1]) < y.shape[-1] // 2, y, 0)


def last_row_lost(kernel: DownKernel, y: mx.array) -> mx.array:
    return y * 0.95


def no_number(kernel: DownKernel, y: mx.array) -> mx.array:
    return y * mx.nan


def kinds(choices: dict[int, Any]) -> list[str]:
    return [choices[tokens].kernel for tokens in ALL_TOKENS]


def logits(checkpoint: Path, *tokens: list[int]) -> np.ndarray:
    """Those of the last token of each sequence, decoded after the others on a selection, by an opened model."""
    model = open_model(checkpoint)
    try:
        model.switch(A)
        cache = make_prompt_cache(model.module)
        batch = mx.array(tokens)
        mx.eval(model(batch[:, :-1], cache=cache))
        return np.array(model(batch[:, -1:], cache=cache)[:, -1].astype(mx.float32))
    finally:
        model.close()


# What is chosen, and why.


def test_without_a_metal_gpu_it_is_mlx(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    choices = choose(Checkpoint.open(packed))
    assert kinds(choices) == [MLX] * 5
    assert {choice.reason for choice in choices.values()} == {"there is no Metal GPU"}
    assert down_product._kept == {}


def test_the_real_kernel_fails_here_and_is_not_kept(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No stand-in: `metal_kernel` itself, which says that there is no Metal."""
    if mx.metal.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(down_product, "_on_metal", lambda: True)
    choices = choose(Checkpoint.open(packed))
    assert kinds(choices) == [MLX] * 5
    assert "ours fails ([metal_kernel] No Metal back-end.)" in choices[1].reason
    assert build is down_product.build
    (record,) = caplog.records
    assert "is not used for 1 or more tokens: it fails ([metal_kernel]" in record.getMessage()


def test_the_faster_right_one_is_kept(packed: Path, metal: list[DownKernel]) -> None:
    choices = choose(Checkpoint.open(packed))
    assert kinds(choices) == [OWN] * 5
    assert "ours takes" in choices[1].reason
    assert "MLX's" in choices[1].reason
    assert {kernel.lanes for kernel in metal if kernel.tokens == 1} == set(LANES)
    assert all(len({kernel.lanes for kernel in metal if kernel.tokens == tokens}) == 1 for tokens in ALL_TOKENS[1:])


@pytest.mark.usefixtures("metal")
def test_the_fastest_tile_is_kept(packed: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        down_product, "build", lambda kernel: clock.slowed(unpacked(kernel), {32: 0.5, 16: 0.25, 8: 2}[kernel.lanes])
    )
    choices = choose(Checkpoint.open(packed))
    assert kinds(choices) == [OWN] * 5
    assert choices[5].reason == "ours takes 250000 us with tiles of 128 columns, MLX's 1000000 us"


@pytest.mark.usefixtures("metal")
def test_a_slower_one_is_left(packed: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(down_product, "build", lambda kernel: clock.slowed(unpacked(kernel), 1.5))
    choices = choose(Checkpoint.open(packed))
    assert kinds(choices) == [MLX] * 5
    assert choices[1].reason == "ours takes 1500000 us with tiles of 256 columns, MLX's 1000000 us"
    assert down_product._kept == {}


@pytest.mark.usefixtures("metal")
def test_each_number_of_tokens_is_decided_by_itself(
    packed: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        down_product, "build", lambda kernel: clock.slowed(unpacked(kernel), 1.5 if kernel.tokens == 2 else 0.5)
    )
    assert kinds(choose(Checkpoint.open(packed))) == [OWN, MLX, OWN, OWN, OWN]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (made(halved), "is wrong by"),
        (made(last_row_lost), "is wrong by 0.05"),
        (made(no_number), "is wrong by nan"),
        (refuse, "fails ([metal::Device] Unable to build metal library from source error: expected ';')"),
    ],
)
def test_a_wrong_one_is_left_and_said(
    packed: Path,
    metal: list[DownKernel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: Build,
    words: str,
) -> None:
    wanted = logits(packed, TOKENS)
    down_product._chosen.clear()
    monkeypatch.setattr(down_product, "build", broken)
    with caplog.at_level(logging.WARNING, "ifprune_mlx"):
        found = logits(packed, TOKENS)
        choices = choose(Checkpoint.open(packed))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert kinds(choices) == [MLX] * 5
    assert words in choices[1].reason
    (record,) = caplog.records  # once, though it is asked for twice
    assert f"our kernel for down products is not used for 1 or more tokens: it {words}" in record.getMessage()


def test_what_fails_for_some_is_kept_for_fewer(
    packed: Path, metal: list[DownKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a GPU that has no room for the sums of many tokens."""
    monkeypatch.setattr(down_product, "build", lambda kernel: (refuse if kernel.tokens >= 4 else unpacked)(kernel))
    assert kinds(choose(Checkpoint.open(packed))) == [OWN, OWN, OWN, MLX, MLX]


def test_it_is_tried_once_for_equal_rows(packed: Path, metal: list[DownKernel]) -> None:
    choose(Checkpoint.open(packed))
    count = len(metal)
    choose(Checkpoint.open(packed))
    assert len(metal) == count
    choose(Checkpoint.open(packed), mx.float16)
    assert len(metal) > count


def test_rows_that_it_is_not_written_for(tmp_path: Path, metal: list[DownKernel]) -> None:
    options = Options(quantization=quantization_of("mxfp4", None, None))
    choices = choose(Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", options=options)))
    assert {choice.reason for choice in choices.values()} == {"ours is not written for such rows"}
    assert metal == []


# How it is used.


@pytest.mark.parametrize("sequences", ALL_TOKENS)
def test_answers_are_those_of_mlx(packed: Path, monkeypatch: pytest.MonkeyPatch, sequences: int) -> None:
    """In a real model, with the kernel as the emulator runs it; a token of each sequence of a batch."""
    batch = [[*TOKENS[:-1], 3 + index] for index in range(sequences)]
    wanted = logits(packed, *batch)
    layout = Checkpoint.open(packed).layout
    kernel = DownKernel(layout.ffns[0].d_model, mx.float32, layout.down, sequences, 8)
    ran: list[tuple[int, ...]] = []

    def emulating(*given: mx.array) -> mx.array:
        ran.append(given[0].shape)
        return build_emulated(kernel)(*given)

    monkeypatch.setattr(down_product, "_on_metal", lambda: True)
    rows = down_product._Rows(kernel.packing, kernel.width, kernel.dtype)
    down_product._chosen[rows] = {}
    down_product._kept[rows, sequences] = emulating
    found = logits(packed, *batch)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert ran == [(sequences, len(ids)) for ids in A.ids]


def test_prefill_is_mlx(packed: Path, metal: list[DownKernel]) -> None:
    model = open_model(packed)
    model.switch(A)
    metal.clear()
    mx.eval(model(mx.array([[1, 2, 3, 4, 5, 6]])))
    assert metal == []
    mx.eval(model(mx.array([[1, 2, 3, 4, 5]])))
    assert len(metal) == len(model.slots)


def test_float_rows(tiny_checkpoint: Path, metal: list[DownKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = logits(tiny_checkpoint, TOKENS)
    key = next(iter(down_product._chosen))
    down_product._kept.update({(key, 1): unpacked(DownKernel(key.width, key.dtype, None, 1, 8))})
    np.testing.assert_allclose(logits(tiny_checkpoint, TOKENS), wanted, rtol=1e-4, atol=1e-5)
    down_product._kept.update(
        {(key, 1): lambda *given: unpacked(DownKernel(key.width, key.dtype, None, 1, 8))(*given) * 0}
    )
    assert not np.allclose(logits(tiny_checkpoint, TOKENS), wanted, rtol=1e-2)


def test_training_takes_mlx(packed: Path, metal: list[DownKernel]) -> None:
    """Our kernel has no gradient."""
    model = open_model(packed)
    metal.clear()
    model.module.train()
    mx.eval(model(mx.array([[1, 2]])))
    assert metal == []


def test_on_the_cpu_it_is_not_run(packed: Path, metal: list[DownKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """As within `mx.stream(mx.cpu)`, after it was chosen for the GPU."""
    model = open_model(packed)
    metal.clear()
    monkeypatch.setattr(down_product, "_on_metal", lambda: False)
    mx.eval(model(mx.array([[1, 2]])))
    assert metal == []


# What the user sees and sets.


def test_the_environment_turns_it_off(packed: Path, metal: list[DownKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS, MLX)
    assert {choice.reason for choice in choose(Checkpoint.open(packed)).values()} == {"IFPRUNE_KERNELS is mlx"}
    mx.eval(open_model(packed)(mx.array([[1]])))
    assert metal == []


def test_another_value_is_one_line(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS, "fast")
    with pytest.raises(IfpruneError, match="IFPRUNE_KERNELS is 'fast'; set it to mlx"):
        choose(Checkpoint.open(packed))
    done = run_here("generate", "--model", packed, "--prompt", "a", env={KERNELS: "fast"})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_info_names_the_kernel(packed: Path, metal: list[DownKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = json.loads(run_here("info", "--model", packed, "--json").stdout)["down_kernels"]
    assert {tokens: choice["kernel"] for tokens, choice in shown.items()} == dict.fromkeys("12345", OWN)
    assert "ours takes" in shown["1"]["reason"]
    off = run_here("info", "--model", packed, "--json", env={KERNELS: MLX})
    expected = {"kernel": MLX, "reason": "IFPRUNE_KERNELS is mlx"}
    assert json.loads(off.stdout)["down_kernels"] == dict.fromkeys("12345", expected)
    text = run_here("info", "--model", packed, env={KERNELS: MLX}).stdout
    assert "GPU kernel   1 to 5 tokens: MLX's kernel (IFPRUNE_KERNELS is mlx)" in text


def test_info_tries_what_loading_would(
    tmp_path: Path, metal: list[DownKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an M1, bfloat16 rows are float16; and no config needs a `hidden_size`."""
    real = mx.device_info()
    monkeypatch.setattr(mx, "device_info", lambda *device: {**real, "device_name": "Apple M1"})
    write_family(tmp_path / "source", "openelm")
    options = Options(quantization=quantization_of("affine", 64, 4), dtype=mx.bfloat16)
    convert(open_source(tmp_path / "source"), tmp_path / "ifp", options)
    done = run_here("info", "--model", tmp_path / "ifp")
    assert done.returncode == 0, done.stderr
    assert {kernel.dtype for kernel in metal} == {mx.float16}


def test_a_trial_is_of_the_shape_that_the_model_has(packed: Path, metal: list[DownKernel]) -> None:
    choose(Checkpoint.open(packed), mx.bfloat16)
    (kernel,) = {replace(kernel, tokens=1, lanes=8) for kernel in metal}
    checkpoint = Checkpoint.open(packed)
    assert kernel == DownKernel(checkpoint.layout.ffns[0].d_model, mx.bfloat16, checkpoint.layout.down, 1, 8)


def test_a_trial_is_of_the_widest_ffn(tmp_path: Path, metal: list[DownKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever among the layers it is."""
    monkeypatch.setitem(OVERRIDES, "openelm", OVERRIDES["openelm"] | {"ffn_multipliers": [1.0, 3.0, 2.0]})
    write_family(tmp_path / "source", "openelm")
    convert(open_source(tmp_path / "source"), tmp_path / "ifp", Options(density=0.5))
    multiplied: set[int] = set()

    def noting(kernel: DownKernel) -> Product:
        return lambda x, *rows: (multiplied.add(x.shape[1]), unpacked(kernel)(x, *rows))[1]

    monkeypatch.setattr(down_product, "build", noting)
    checkpoint = Checkpoint.open(tmp_path / "ifp")
    choose(checkpoint)
    assert multiplied == {96}
    assert checkpoint.widths == (64, 192, 128)
