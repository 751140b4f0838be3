"""Models that mlx-lm quantized already: gate, up and everything else keep their bytes, down is packed anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.convert import convert as mlx_lm_convert
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

from ifprune_convert.export import export_selection
from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import load
from ifprune_mlx.checkpoint.budget import keep_count
from ifprune_mlx.checkpoint.format import Checkpoint, Quantization
from ifprune_mlx.errors import SourceError
from ifprune_mlx.model import Model, load_checkpoint
from ifprune_mlx.selection.selection import Selection
from tests.cli.process import run_here
from tests.ifprune_mlx.reference import dequantized_model
from tests.tiny import write_source

PACKINGS = [("affine", 64, 4), ("affine", 32, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4)]


def quantized(folder: Path, family: str, packing: tuple[str, int, int], recipe: Any = None) -> Path:
    """What `mlx_lm.convert -q` makes of a tiny model."""
    source = write_source(folder / f"float-{family}", family)
    mode, group_size, bits = packing
    target = folder / f"quantized-{family}-{mode}-{bits}"
    mlx_lm_convert(
        str(source),
        str(target),
        quantize=True,
        q_group_size=group_size,
        q_bits=bits,
        q_mode=mode,
        quant_predicate=recipe,
    )
    return target


def arrays_of(folder: Path, pattern: str) -> dict[str, mx.array]:
    """All tensors of a folder's files."""
    result: dict[str, mx.array] = {}
    for file in sorted(folder.glob(pattern)):
        result |= mx.load(str(file))
    return result


def logits(model: Any, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array([list(tokens)]))[0].astype(mx.float32))


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing[0]}-{packing[2]}")
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3", "gemma2"])
def test_packed_bytes_are_kept(tmp_path: Path, family: str, packing: tuple[str, int, int]) -> None:
    source = quantized(tmp_path, family, packing)
    made = convert(open_source(source), tmp_path / "ifp", Options()).checkpoint
    assert made.layout.gate_up == Quantization(packing[1], packing[2], packing[0])
    assert made.layout.down == Quantization(64, 8, "affine")

    before, after = arrays_of(source, "model*.safetensors"), arrays_of(tmp_path / "ifp", "model-*.safetensors")
    for index, spec in enumerate(made.layout.ffns):
        rows = mx.load(str(made.neurons_file(index)))
        down = {part: before.pop(f"{spec.path}.{spec.down}.{part}", None) for part in ("weight", "scales", "biases")}
        for part in ("weight", "scales", "biases", "bias"):
            both = [before.pop(f"{spec.path}.{leaf}.{part}", None) for leaf in (spec.gate, spec.up)]
            if both[0] is None:
                assert f"gate_up.{part}" not in rows
            else:
                assert mx.array_equal(rows[f"gate_up.{part}"], mx.stack(both, axis=1))
        before.pop(f"{spec.path}.{spec.down}.bias", None)
        # Packed a second time, at 8 bits: no further from what was packed before than those can be.
        stock = mx.dequantize(*down.values(), group_size=packing[1], bits=packing[2], mode=packing[0]).astype(
            mx.float32
        )
        parts = (rows[f"down.{part}"] for part in ("weight", "scales", "biases"))
        ours = mx.dequantize(*parts, group_size=64, bits=8).astype(mx.float32)
        assert np.abs(np.array(ours.T - stock)).max() < np.abs(np.array(stock)).max() / 100
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing[0]}-{packing[2]}")
def test_with_float_down_it_computes_what_stock_mlx_lm_does(tmp_path: Path, packing: tuple[str, int, int]) -> None:
    source = quantized(tmp_path, "llama", packing)
    made = convert(open_source(source), tmp_path / "ifp", Options(float_down=True)).checkpoint
    assert made.layout.down is None
    stock, _ = load_model(source)
    ours = load_checkpoint(made)
    tokens = list(range(1, 40, 3))
    assert np.abs(logits(ours, tokens) - logits(stock, tokens)).max() < 1e-4

    # Sliced equals masked: the stock model with the down projections' inputs masked.
    rng = np.random.default_rng(0)
    ids = [np.sort(rng.permutation(128)[: keep_count(0.5, 128)]).astype(np.int32) for _ in range(2)]
    ours.switch(Selection(tuple(ids), (128, 128), "random"))
    for layer, kept in zip(stock.model.layers, ids, strict=True):
        mask = np.zeros(128, dtype=np.float32)
        mask[kept] = 1
        layer.mlp.down_proj = _Masked(layer.mlp.down_proj, mx.array(mask))
    assert np.abs(logits(ours, tokens) - logits(stock, tokens)).max() < 1e-4


class _Masked(nn.Module):
    def __init__(self, down: nn.Module, mask: mx.array) -> None:
        super().__init__()
        self.down, self._mask = down, mask

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(x * self._mask)


@pytest.mark.parametrize("float_down", [True, False])
def test_mixed_recipes_and_exports(tmp_path: Path, float_down: bool) -> None:
    """Layers of several kinds go in, and come out again as a folder that stock mlx-lm reads."""

    def recipe(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if "down_proj" in path:
            return {"group_size": 32, "bits": 6, "mode": "affine"}
        if "v_proj" in path:
            return False
        return {"group_size": 64, "bits": 8, "mode": "affine"} if "embed" in path else True

    source = quantized(tmp_path, "llama", ("affine", 64, 4), recipe)
    made = convert(open_source(source), tmp_path / "ifp", Options(float_down=float_down)).checkpoint
    stock, _ = load_model(source)
    tokens = list(range(1, 40, 3))
    model = load_checkpoint(made)
    tolerance = 1e-4 if float_down else 0.05
    assert np.abs(logits(model, tokens) - logits(stock, tokens)).max() < tolerance
    assert made.parameters == Checkpoint.open(_plain(tmp_path)).parameters

    selection = Selection(tuple(np.arange(64, dtype=np.int32) for _ in range(2)), (128, 128), "random")
    export_selection(made, selection, tmp_path / "export")
    exported, config = load_model(tmp_path / "export")
    model.switch(selection)
    assert np.abs(logits(model, tokens) - logits(exported, tokens)).max() < 1e-4
    assert config["quantization"]["model.layers.0.mlp.down_proj"] is False


def test_sections_without_a_mode_are_affine(tmp_path: Path) -> None:
    """Older releases of mlx-lm wrote none."""
    source = quantized(tmp_path, "llama", ("affine", 64, 4))
    edit(source, quantization={"group_size": 64, "bits": 4})
    made = convert(open_source(source), tmp_path / "ifp", Options()).checkpoint
    assert made.layout.gate_up == Quantization(64, 4, "affine")
    selection = Selection(tuple(np.arange(64, dtype=np.int32) for _ in range(2)), (128, 128), "random")
    export_selection(made, selection, tmp_path / "export")
    load_model(tmp_path / "export")


def _plain(folder: Path) -> Path:
    convert(open_source(folder / "float-llama"), folder / "plain", Options())
    return folder / "plain"


def test_an_adapter_is_fused_and_only_its_weights_are_packed_again(tmp_path: Path) -> None:
    source = quantized(tmp_path, "llama", ("affine", 64, 4))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.random.seed(0)
    stem = "model.layers.1.self_attn.q_proj"
    tensors = {f"{stem}.lora_a": mx.random.normal((64, 4)), f"{stem}.lora_b": mx.random.normal((4, 64))}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)
    parameters = {"rank": 4, "scale": 0.5, "dropout": 0.0}
    (adapter / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters})
    )
    convert(open_source(source), tmp_path / "plain", Options())
    convert(open_source(source), tmp_path / "adapted", Options(adapter=adapter))
    before, after = (arrays_of(tmp_path / name, "model-*.safetensors") for name in ("plain", "adapted"))
    changed = {name.rpartition(".")[0] for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == {stem}
    weight, fused = (
        mx.dequantize(*(found[f"{stem}.{part}"] for part in ("weight", "scales", "biases")), group_size=64, bits=4)
        for found in (before, after)
    )
    expected = weight + 0.5 * (tensors[f"{stem}.lora_a"] @ tensors[f"{stem}.lora_b"]).T
    assert np.abs(np.array(fused - expected)).max() < np.abs(np.array(expected)).max() / 10


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "options", "words"),
    [
        (lambda folder: None, Options(quantization=quantization_of("affine", 64, 4)), "is quantized already"),
        (lambda folder: edit(folder, quantization={"group_size": 32, "bits": 4}), Options(), "is not packed in 4 bits"),
        (lambda folder: edit(folder, quantization={"group_size": 64, "bits": "x"}), Options(), "cannot be used"),
        (lambda folder: edit(folder, quantization=[64, 4]), Options(), "cannot be used"),
        (
            lambda folder: edit(folder, quantization={"group_size": 64, "bits": 4, "model.embed_tokens": False}),
            Options(),
            "cannot be used",
        ),
        (lambda folder: edit(folder, quantize_activations=True), Options(), "quantizes activations"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, break_it: Any, options: Options, words: str) -> None:
    source = quantized(tmp_path, "llama", ("affine", 64, 4))
    break_it(source)
    with pytest.raises(SourceError, match=words) as caught:
        convert(open_source(source), tmp_path / "ifp", options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ifp").exists()


def test_ffns_that_are_packed_in_several_ways_are_refused(tmp_path: Path) -> None:
    def recipe(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return {"group_size": 32, "bits": 8} if "layers.1.mlp.gate_proj" in path else True

    source = quantized(tmp_path, "llama", ("affine", 64, 4), recipe)
    with pytest.raises(SourceError, match="not all quantized in the same way"):
        convert(open_source(source), tmp_path / "ifp", Options())


def test_float_down_is_for_quantized_models(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not quantized; leave out --float-down"):
        convert(open_source(write_source(tmp_path / "source")), tmp_path / "ifp", Options(float_down=True))


def nll(model: Any, tokens: Sequence[int]) -> float:
    scores = logits(model, tokens[:-1]).astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    chosen = scores[np.arange(len(tokens) - 1), tokens[1:]]
    return float(np.mean(np.log(np.exp(scores).sum(axis=-1)) - chosen))


def held_out_text() -> str:
    """Real answers, some 1,500 tokens."""
    lines = (Path(__file__).parents[2] / "scripts" / "held_out" / "general.jsonl").read_text().splitlines()[:20]
    return "\n\n".join(message["content"] for line in lines for message in json.loads(line)["messages"])


@pytest.mark.real
@pytest.mark.parametrize(("mode", "group_size", "bits"), [("affine", 64, 4), ("affine", 64, 8), ("mxfp4", 32, 4)])
def test_smollm2_that_mlx_lm_quantized(
    smollm2_base: Path, tmp_path: Path, mode: str, group_size: int, bits: int
) -> None:
    """At density 1 the loss is stock mlx-lm's on the same folder, to a hundredth of a nat."""
    base = Checkpoint.open(smollm2_base)
    everything = tuple(np.arange(spec.d_ffn, dtype=np.int32) for spec in base.layout.ffns)
    selection = Selection(everything, tuple(spec.d_ffn for spec in base.layout.ffns), "static")
    export_selection(base, selection, tmp_path / "float")
    mlx_lm_convert(
        str(tmp_path / "float"), str(tmp_path / "q"), quantize=True, q_group_size=group_size, q_bits=bits, q_mode=mode
    )
    shutil.rmtree(tmp_path / "float")
    tokens = load_tokenizer(tmp_path / "q").encode(held_out_text())[:1000]
    stock, _ = load_model(tmp_path / "q")
    convert(open_source(tmp_path / "q"), tmp_path / "ifp", Options())
    model, tokenizer = load(tmp_path / "ifp")
    assert isinstance(model, Model)
    assert tokenizer.encode(held_out_text())[:1000] == tokens
    # MLX's CPU build multiplies packed weights slowly: the many tokens go through the floats that they stand for, and a
    # few show that the packed models compute those.
    plain, ours = dequantize_model(stock), dequantized_model(tmp_path / "ifp")
    few = tokens[:8]
    assert np.abs(logits(model, few) - logits(ours, few)).max() < 0.01
    expected, found = nll(plain, tokens), nll(ours, tokens)
    print(f"{mode} {bits} bit: stock {expected:.4f}, ours {found:.4f} nats per token")
    assert abs(found - expected) < 0.01


def test_info_says_how_down_is_stored(tmp_path: Path) -> None:
    source = quantized(tmp_path, "llama", ("affine", 64, 4))
    convert(open_source(source), tmp_path / "ifp", Options())
    done = run_here("info", "--model", tmp_path / "ifp")
    assert "affine, 4 bit, groups of 64 (down projections affine, 8 bit, groups of 64" in done.stdout
