"""Loading: casts, progress, what mlx-lm's own functions need, and what a closed model still does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import CheckpointError, Model, SelectionError, load
from tests.ifprune_mlx.reference import greedy, logits, open_model, random_selection, source_model
from tests.tiny import CONFIGS, write_checkpoint

TOKENS = [1, 40, 300, 7, 7, 99]
SELECTION = random_selection((128, 128), (40, 64), seed=1)


def test_a_loaded_model_is_dense_and_has_a_tokenizer(tiny_checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    model, tokenizer = load(str(tiny_checkpoint), progress=lambda done, total: seen.append((done, total)))
    assert model.selection is None
    assert model.active_parameters == model.total_parameters
    assert seen == [(1, 2), (2, 2)]
    assert tokenizer.decode(tokenizer.encode("Hé, 東京!")) == "Hé, 東京!"
    assert tokenizer.eos_token_ids == {2}


def test_mlx_lm_takes_it_for_one_of_its_own(tiny_checkpoint: Path) -> None:
    model = open_model(tiny_checkpoint)
    assert len(make_prompt_cache(model.module)) == len(model.layers) == 2
    assert np.array_equal(np.array(model(mx.array([TOKENS]))), np.array(model.module(mx.array([TOKENS]))))
    expected = greedy(source_model(tiny_checkpoint), TOKENS, 6)
    assert greedy(model.module, TOKENS, 6) == expected
    assert type(model.module).__mro__[1].__module__ == "mlx_lm.models.llama"


@pytest.mark.parametrize("packing", [None, ("affine", 32, 8), ("mxfp8", 32, 8)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_weights_can_be_cast_at_loading(tmp_path: Path, packing: tuple[str, int, int] | None, dtype: mx.Dtype) -> None:
    options = Options(quantization=quantization_of(*packing) if packing else None)
    folder = write_checkpoint(tmp_path / "checkpoint", "llama-bias", options)
    model, _ = load(folder, dtype=dtype)
    arrays = [array for _, array in tree_flatten(model.module.parameters())]
    for slots in model.slots:
        arrays += [*slots.rows.values(), slots.down_bias]
    integers = {mx.uint32, mx.uint8} if packing else set()
    assert {array.dtype for array in arrays} - integers == {dtype}

    plain = open_model(folder)
    for each in (model, plain):
        each.switch(SELECTION)
    found, expected = model(mx.array([TOKENS])), plain(mx.array([TOKENS]))
    # mlx-lm's embedding in mxfp8 gives bfloat16 whatever the rest is, and bfloat16 meets float16 in float32.
    assert found.dtype == (mx.float32 if packing and packing[0] == "mxfp8" and dtype == mx.float16 else dtype)
    # bfloat16 keeps 8 bits of a number, and logits are sums of a few hundred products.
    error = np.abs(np.array(found.astype(mx.float32)) - np.array(expected)).max()
    assert error < {mx.float16: 0.02, mx.bfloat16: 0.15, mx.float32: 1e-6}[dtype]


def test_the_context_is_the_one_in_the_config(tiny_checkpoint: Path) -> None:
    model = open_model(tiny_checkpoint)
    assert model.context_length == 512
    del model.config["max_position_embeddings"]
    assert model.context_length is None
    model.config["text_config"] = {"max_position_embeddings": 256}  # as families with a vision part have it
    assert model.context_length == 256


@pytest.mark.parametrize("family", CONFIGS)
def test_the_slots_are_no_parameters_of_the_module(tmp_path: Path, family: str) -> None:
    model = open_model(write_checkpoint(tmp_path / "checkpoint", family))
    names = [name for name, _ in tree_flatten(model.module.parameters())]
    assert not [name for name in names if ".mlp." in name]
    assert len(model.down_leaves) == len(model.slots) == 2


def test_a_plain_model_folder_is_refused_with_what_to_do(tiny_checkpoint: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"no ifpruning section\); `ifprune chat --model .*` converts it at first use",
    ):
        load(tiny_checkpoint.with_name("source-of-checkpoint"))


def test_a_gguf_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for name in ("x.gguf", "without suffix"):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"is a GGUF file, no IFP checkpoint yet; `ifprune chat --model '?/"):
            load(tmp_path / name)


def test_a_name_that_is_no_folder_and_no_repository_is_refused() -> None:
    for name in ("/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder; give a model: its folder, a GGUF file or a hub id"):
            load(name)


def test_a_closed_model_gives_its_memory_back(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", hidden_size=512, intermediate_size=2048, head_dim=64)
    mx.clear_cache()
    before = mx.get_active_memory()
    model = open_model(folder)
    model.switch(random_selection((2048, 2048), (512, 1024), seed=1))
    logits(model, TOKENS)
    assert mx.get_active_memory() - before > 0.9 * model.checkpoint.weight_bytes
    model.close()
    assert mx.get_active_memory() - before < 0.1 * model.checkpoint.weight_bytes


def test_a_switch_keeps_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", hidden_size=512, intermediate_size=2048, head_dim=64)
    model = open_model(folder)
    largest = max(rows.nbytes for rows in model.slots[0].rows.values())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for seed in range(5):
        model.switch(random_selection((2048, 2048), (512, 1024), seed=seed))
    assert mx.get_active_memory() <= before + 1000
    # One array's copy where MLX cannot write in place, and the rows that move.
    assert mx.get_peak_memory() - before < 2.5 * largest


@pytest.mark.parametrize("widths", [(128,), (64, 64), (128, 128, 128)])
def test_a_selection_for_another_model_is_refused(tiny: tuple[Model, Any], widths: tuple[int, ...]) -> None:
    model, live = tiny[0], tiny[0].selection
    with pytest.raises(SelectionError, match="made for another model"):
        model.switch(random_selection(widths, [8] * len(widths), seed=1))
    assert model.selection is live
