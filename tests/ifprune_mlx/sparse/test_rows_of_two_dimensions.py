"""Every product with packed neuron-major rows gets rows of two dimensions: others Metal's kernel mixes up.

MLX's kernel is simulated index by index where it matters, and refused more than two dimensions everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Model, load, stream_generate
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.data.dataloader import DataMixture
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.serving.engine.decoder import batch_error
from ifprune_mlx.sparse import quantized
from ifprune_mlx.train.attribution import attribution, midpoint_masks
from ifprune_mlx.train.lora import LoRAModel
from ifprune_mlx.train.trainer import Trainer
from tests.ifprune_mlx.reference import greedy, random_selection
from tests.ifprune_mlx.serving.engine.engines import make_request, prompt, serving, stats_of, text_of, together
from tests.ifprune_mlx.sparse import metal_products
from tests.ifprune_mlx.train.configs import config
from tests.tiny import write_checkpoint

PACKING = Quantization(64, 4, "affine")
WIDE = 1088  # active neurons: Metal splits their sum
SELECTION = random_selection((1152, 1152), (WIDE, WIDE), seed=1)
NARROW = random_selection((1152, 1152), (1000, 1000), seed=1)
Tiny = tuple[Model, Any]


def drawn(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is packed, with FFNs wide enough for the kernel that splits sums."""
    options = Options(quantization=quantization_of("affine", 64, 4))
    return write_checkpoint(tmp_path_factory.mktemp("rows") / "checkpoint", options=options, intermediate_size=1152)


@pytest.fixture
def model(packed: Path) -> Iterator[Tiny]:
    made = load(packed)
    made[0].switch(SELECTION)
    yield made
    made[0].close()


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX multiplies as on Metal."""
    monkeypatch.setattr(mx, "quantized_matmul", metal_products.quantized_matmul)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what neuron-major rows are multiplied by, in gradients too."""
    seen: list[tuple[int, ...]] = []
    plain: Callable[..., mx.array] = mx.quantized_matmul

    def watched(x: mx.array, *arrays: mx.array | None, transpose: bool = True, **settings: Any) -> mx.array:
        if not transpose:
            seen.append(x.shape)

        @mx.custom_function
        def product(x: mx.array) -> mx.array:
            return plain(x, *arrays, transpose=transpose, **settings)

        @product.vjp
        def _(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:  # as MLX's own, see the next test
            return watched(cotangent, *arrays, transpose=not transpose, **settings)

        found: mx.array = product(x)
        return found

    monkeypatch.setattr(mx, "quantized_matmul", watched)
    return seen


def assert_two_dimensions(shapes: Sequence[tuple[int, ...]], rows: int) -> None:
    """And that many rows were multiplied together at least once."""
    assert {len(shape) for shape in shapes} == {2}
    assert rows in {shape[0] for shape in shapes}


# The kernel.


@pytest.mark.parametrize(("sequences", "lost"), [(2, 128), (3, 256)])
def test_metal_mixes_up_two_or_three_sequences(sequences: int, lost: int) -> None:
    """As the product was called before: values that are never written, and none that is right."""
    x, rows = np.array(drawn(sequences, 1, 1024)), np.array(drawn(1024, 128))
    found = metal_products.qvm_split_k(x, rows)
    assert np.isnan(found).sum() == lost
    assert not np.isclose(found, x @ rows, rtol=1e-3).all(axis=-1).any()


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (1, 1), (1, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("neurons", [1024, 1500, 2048, 8224])
def test_metal_multiplies_rows_of_two_dimensions_rightly(shape: tuple[int, ...], neurons: int) -> None:
    """So the simulation has no other fault."""
    x, rows = np.array(drawn(*shape, neurons)), np.array(drawn(neurons, 64))
    np.testing.assert_allclose(metal_products.qvm_split_k(x, rows), x @ rows, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (2,), (1, 1), (2, 1), (3, 1), (8, 1), (2, 1, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("neurons", [1000, 1024, 2048, 8224])
@pytest.mark.usefixtures("metal")
def test_our_product_is_right_with_metals_kernel(shape: tuple[int, ...], neurons: int) -> None:
    x, arrays = drawn(*shape, neurons), mx.quantize(drawn(neurons, 64), **PACKING.to_dict())
    wanted = np.array(x @ mx.dequantize(*arrays, **PACKING.to_dict()))
    found = quantized.neuron_major_matmul(x, *arrays, PACKING)
    np.testing.assert_allclose(np.array(found), wanted, atol=1e-3)


# Where neuron-major rows are multiplied by.


def test_the_gradient_of_a_packed_product_has_rows_of_its_outputs_shape() -> None:
    """MLX's own graph of it, so that products of gate and up, of attention and of the output layer matter as well."""
    steps: list[dict[str, Any]] = []
    arrays = mx.quantize(drawn(128, 64), **PACKING.to_dict())

    def loss(x: mx.array) -> mx.array:
        return mx.square(mx.quantized_matmul(x, *arrays, **PACKING.to_dict())).sum()

    mx.export_function(steps.append, mx.grad(loss), drawn(2, 1, 64))
    products = [step for step in steps if step.get("name") == "QuantizedMatmul"]
    assert [step["arguments"][-1] for step in products] == [True, False]  # transposed?
    assert [step["inputs"][0][1] for step in products] == [(2, 1, 64), (2, 1, 128)]


def test_an_answer(model: Tiny, shapes: list[tuple[int, ...]]) -> None:
    list(stream_generate(*model, prompt(0), max_tokens=3))
    assert_two_dimensions(shapes, 1)


@pytest.mark.parametrize("sequences", [2, 3, 8])
def test_a_batch_of_requests(model: Tiny, shapes: list[tuple[int, ...]], sequences: int) -> None:
    requests = [make_request(prompt(seed), SELECTION, max_tokens=20) for seed in range(sequences)]
    with serving(model) as engine:
        together(engine, *requests)
    assert_two_dimensions(shapes, sequences)


@pytest.mark.parametrize("sequences", [2, 3, 8])
def test_mlx_lms_batch_generate(model: Tiny, shapes: list[tuple[int, ...]], sequences: int) -> None:
    mlx_lm.batch_generate(*model, [list(prompt(seed)) for seed in range(sequences)], max_tokens=4)
    assert_two_dimensions(shapes, sequences)


def test_the_trial_of_batching(model: Tiny, shapes: list[tuple[int, ...]]) -> None:
    assert batch_error(model[0]) < 1e-5
    assert_two_dimensions(shapes, 2)


@pytest.mark.parametrize("recompute", [False, True])
def test_training(packed: Path, tmp_path: Path, shapes: list[tuple[int, ...]], recompute: bool) -> None:
    """The products of gradients too, which MLX makes itself: of the FFNs, of attention, and of the output layer."""
    model, _ = load(packed)
    settings = config(
        output=tmp_path, selector=("static",), batch_size=2, micro_batch_size=2, grad_checkpoint=recompute
    )
    mixture = DataMixture({"a": (_chats(), 1.0)}, 0)
    Trainer(LoRAModel(model, rank=2, scale=2.0), None, model.prior, mixture, settings).advance()
    assert_two_dimensions(shapes, 2)
    assert len(shapes) >= 2 * 7  # of two layers


def test_the_attribution_of_neurons(packed: Path, shapes: list[tuple[int, ...]]) -> None:
    model, _ = load(packed)
    attribution(model, _chats(), midpoint_masks(model))
    assert_two_dimensions(shapes, 2)


# What comes out.


@pytest.mark.parametrize("sequences", [2, 3, 8])
@pytest.mark.usefixtures("metal")
def test_requests_get_the_same_together_as_alone_by_metals_kernel(model: Tiny, sequences: int) -> None:
    requests = [make_request(prompt(seed), SELECTION) for seed in range(sequences)]
    with serving(model) as engine:
        alone = [together(engine, one)[0] for one in requests]
        batch = together(engine, *requests)
    assert [text_of(outputs) for outputs in batch] == [text_of(outputs) for outputs in alone]
    assert max(stats_of(outputs).batch for outputs in batch) == sequences


@pytest.mark.parametrize("sequences", [2, 3, 8])
@pytest.mark.usefixtures("metal")
def test_batch_generate_gives_the_same_as_alone_by_metals_kernel(model: Tiny, sequences: int) -> None:
    """With our model, and with mlx-lm's own object in it."""
    prompts = [list(prompt(seed)) for seed in range(sequences)]
    alone = [greedy(model[0].module, one, 8) for one in prompts]
    for each in (model[0], model[0].module):
        assert mlx_lm.batch_generate(each, model[1], prompts, max_tokens=8, return_token_ids=True).token_ids == alone


def test_batching_is_tried_out_for_each_kernel(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of few neurons says nothing about one of many."""
    asked: list[int] = []

    def can_batch(model: Model) -> bool:
        asked.append(model.slots[0].k)
        return model.slots[0].k < 1024

    monkeypatch.setattr("ifprune_mlx.serving.engine.engine.can_batch", can_batch)
    with serving(model) as engine:
        batches = []
        for selection in (NARROW, SELECTION, NARROW, SELECTION):
            answers = together(engine, *[make_request(prompt(seed), selection) for seed in range(2)])
            batches.append(max(stats_of(outputs).batch for outputs in answers))
    assert asked == [1000, WIDE]
    assert batches == [2, 1, 2, 1]


def _chats() -> list[Example]:
    """Two chats of two tokens: one is read and one predicted, so that a batch of them has one row each."""
    return [Example(np.array([40 + i, 50], np.int32), np.array([False, True]), 1, "", "a", str(i)) for i in range(2)]
