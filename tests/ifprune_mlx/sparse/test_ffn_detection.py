"""Which of mlx-lm's families can be sliced, that slicing them is exact, and why the others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.utils import _get_classes

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx.checkpoint.budget import keep_count
from ifprune_mlx.checkpoint.ffn_spec import HALVES, INTERLEAVED, join_fused, split_fused
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.errors import SourceError
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.sparse.ffn import module_at, replace_leaves
from ifprune_mlx.sparse.ffn_detection import find_ffns
from ifprune_mlx.sparse.slots import FFNSlots, plan_switch
from tests.family_configs import cases, family_model, tiny_config, write_family
from tests.ifprune_mlx.reference import MaskedDown, logits, open_model, random_selection

# Model type: the last FFN's leaves, how a common leaf lies, the widths of all FFNs.
PLAIN = ("gate_proj", "up_proj", "down_proj")
SLICED: dict[str, tuple[tuple[str, ...], str | None, list[int]]] = {
    "Klear": (PLAIN, None, [128, 96, 96, 96]),
    "afm7": (PLAIN, None, [208] * 4),
    "afmoe": (PLAIN, None, [128, 128, 96, 96]),
    "bailing_moe": (PLAIN, None, [128, 96, 96, 96]),
    "cohere": (PLAIN, None, [128] * 4),
    "cohere2": (PLAIN, None, [128] * 4),
    "deepseek": (PLAIN, None, [128] * 4),
    "deepseek_v2": (PLAIN, None, [128, 192, 192, 192]),
    "dots1": (PLAIN, None, [128, 96, 96, 96]),
    "ernie4_5": (PLAIN, None, [128] * 4),
    "exaone": (("c_fc_0", "c_fc_1", "c_proj"), None, [128] * 4),
    "exaone4": (PLAIN, None, [128] * 4),
    "exaone_moe": (PLAIN, None, [128, 96, 96, 96]),
    "falcon_h1": (PLAIN, None, [128] * 4),
    "gemma": (PLAIN, None, [128] * 4),
    "gemma2": (PLAIN, None, [128] * 4),
    "gemma3_text": (PLAIN, None, [128] * 4),
    "gemma4": (PLAIN, None, [128, 128, 256, 256]),
    "glm": (("gate_up_proj", "down_proj"), HALVES, [128] * 4),
    "glm4": (("gate_up_proj", "down_proj"), HALVES, [128] * 4),
    "glm4_moe": (PLAIN, None, [128, 96, 96, 96]),
    "granite": (PLAIN, None, [128] * 4),
    "granitemoehybrid": (PLAIN, None, [128] * 4),
    "helium": (PLAIN, None, [128] * 4),
    "hunyuan_v1_dense": (PLAIN, None, [128] * 4),
    "internlm2": (("w1", "w3", "w2"), None, [128] * 4),
    "internlm3": (PLAIN, None, [128] * 4),
    "iquestloopcoder": (PLAIN, None, [128] * 4),
    "jamba": (PLAIN, None, [128, 128]),
    "kimi_linear": (PLAIN, None, [128, 96, 96, 96]),
    "lfm2": (("w1", "w3", "w2"), None, [128] * 4),
    "lfm2_moe": (PLAIN, None, [128, 128]),
    "lille-130m": (PLAIN, None, [256] * 4),
    "llama": (PLAIN, None, [128] * 4),
    "llama4_text": (PLAIN, None, [160] * 4),
    "longcat_flash": (PLAIN, None, [128] * 4),
    "mimo": (PLAIN, None, [128] * 4),
    "minicpm": (PLAIN, None, [128] * 4),
    "minicpm3": (PLAIN, None, [128] * 4),
    "ministral3": (PLAIN, None, [128] * 4),
    "nanbeige": (PLAIN, None, [128] * 4),
    "nemotron-nas": (PLAIN, None, [256] * 4),
    "olmo2": (PLAIN, None, [128] * 4),
    "olmo3": (PLAIN, None, [128] * 4),
    "olmo_hybrid": (PLAIN, None, [128] * 4),
    "openelm": (("proj_1", "proj_2"), HALVES, [64, 128, 192]),
    "phi3": (("gate_up_proj", "down_proj"), HALVES, [128] * 4),
    "pixtral": (PLAIN, None, [128] * 4),
    "plamo": (PLAIN, None, [128] * 4),
    "plamo3": (("gate_up_proj", "down_proj"), HALVES, [128] * 4),
    "qwen": (("w2", "w1", "c_proj"), None, [64] * 4),
    "qwen2": (PLAIN, None, [128] * 4),
    "qwen2_moe": (PLAIN, None, [96] * 4),
    "qwen2_vl": (PLAIN, None, [128] * 4),
    "qwen3": (PLAIN, None, [128] * 4),
    "qwen3_5": (PLAIN, None, [128] * 4),
    "qwen3_moe": (PLAIN, None, [128]),
    "qwen3_next": (PLAIN, None, [128, 96, 96, 96]),
    "qwen3_vl": (PLAIN, None, [128] * 4),
    "recurrent_gemma": (PLAIN, None, [64] * 4),
    "seed_oss": (PLAIN, None, [128] * 4),
    "smollm3": (PLAIN, None, [128] * 4),
    "solar_open": (PLAIN, None, [128, 96, 96, 96]),
    "stablelm": (PLAIN, None, [128] * 4),
    "step3p5": (PLAIN, None, [128, 128, 96, 96]),
    "talkie": (("mlp_gate", "mlp_linear", "mlp_resid"), None, [128] * 4),
    "telechat3": (PLAIN, None, [128] * 4),
}
MIXES = "computes each neuron from all of them"
ROUTED = "routed experts only"
UNGATED = "two projections and no gate"
REFUSED = {
    "apertus": UNGATED,
    "bitnet": "no FFN of plain linear layers",
    "dbrx": ROUTED,
    "ernie4_5_moe": ROUTED,
    "gemma3n": MIXES,
    "gpt_oss": ROUTED,
    "granitemoe": ROUTED,
    "mamba": "no FFN of plain linear layers",
    "mellum": ROUTED,
    "minimax": ROUTED,
    "mixtral": ROUTED,
    "nanochat": UNGATED,
    "nemotron": UNGATED,
    "olmoe": ROUTED,
    "phi": UNGATED,
    "phimoe": ROUTED,
    "rwkv7": UNGATED,
    "starcoder2": UNGATED,
}
DENSITIES = (0.27, 0.5, 1.0)
PROMPT = [1, 40, 300, 7, 7, 99, 250, 3, 18, 120, 64, 201]
STEPS = [77, 5, 310]


def mask(model: Any, checkpoint: Path, selection: Selection) -> None:
    """Wrap the down projections of a stock model, or change the masks of those that were wrapped."""
    for spec, ids in zip(Checkpoint.open(checkpoint).layout.ffns, selection.ids, strict=True):
        values = np.zeros(spec.d_ffn, dtype=np.float32)
        values[ids] = 1
        ffn = module_at(model, spec.path)
        down = ffn[spec.down]
        ffn[spec.down] = MaskedDown(down.down if isinstance(down, MaskedDown) else down, mx.array(values))


def widths_of(model: Any, model_type: str) -> list[int]:
    return [spec.d_ffn for spec in find_ffns(model, model_type)]


@pytest.mark.parametrize("model_type", cases(SLICED))
def test_sliced_logits_equal_those_of_the_masked_stock_model(tmp_path: Path, model_type: str) -> None:
    dense = write_family(tmp_path / "source", model_type)
    specs = find_ffns(dense, model_type)
    leaves, fused, widths = SLICED[model_type]
    assert (specs[-1].leaves, specs[-1].fused, [spec.d_ffn for spec in specs]) == (leaves, fused, widths)
    assert len({spec.d_model for spec in specs}) == 1  # one kernel for all their down products is chosen

    convert(open_source(tmp_path / "source"), tmp_path / "ifp", Options())
    model = open_model(tmp_path / "ifp")
    plain = logits(dense, PROMPT, STEPS)
    tolerance = 1e-4 * max(1.0, float(np.abs(plain).max()))
    assert np.isfinite(plain).all()
    assert np.abs(logits(model, PROMPT, STEPS) - plain).max() < tolerance
    for density in DENSITIES:
        selection = random_selection(widths, [keep_count(density, width) for width in widths], seed=int(100 * density))
        model.switch(selection)
        mask(dense, tmp_path / "ifp", selection)
        expected = logits(dense, PROMPT, STEPS)
        assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < tolerance
        # The comparison means something only where the mask changes the output by far more than the tolerance.
        assert density == 1 or np.abs(plain - expected).max() > 20 * tolerance


@pytest.mark.parametrize("model_type", cases(REFUSED))
def test_what_cannot_be_sliced_is_refused_with_the_reason(model_type: str) -> None:
    config = tiny_config(model_type)
    assert config is not None
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    with pytest.raises(SourceError, match=f"^model type {model_type} cannot be sliced: .*{REFUSED[model_type]}"):
        find_ffns(model, model_type)


def test_interleaved_leaves_are_found_and_sliced_exactly() -> None:
    """phi3small's. Its own attention ends the process on MLX's CPU build, so only the FFN is run here."""
    model = family_model("phi3small")
    spec = find_ffns(model, "phi3small")[1]
    assert (spec.leaves, spec.fused, spec.d_ffn, spec.bias) == (("up_proj", "down_proj"), INTERLEAVED, 128, True)

    class FFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(64, 256), nn.Linear(128, 64)

        def __call__(self, x: mx.array) -> mx.array:
            hidden = self.up_proj(x)
            return self.down_proj(nn.silu(hidden[..., ::2]) * (hidden[..., 1::2] + 1))

    holder = nn.Module()
    holder.layers = [FFN()]
    [spec] = find_ffns(holder, "odd")
    assert spec.fused == INTERLEAVED
    ffn = holder.layers[0]
    x, ids = mx.random.normal((3, 64)), np.arange(0, 128, 3, dtype=np.int32)
    kept = np.zeros(128, dtype=np.float32)
    kept[ids] = 1
    down = ffn.down_proj
    ffn.down_proj = MaskedDown(down, mx.array(kept))
    expected = ffn(x)
    mx.eval(expected)  # before rows that share its weights' buffers are moved
    gate, up = split_fused(ffn.up_proj.weight, INTERLEAVED)
    gate_bias, up_bias = split_fused(ffn.up_proj.bias, INTERLEAVED)
    rows = {"gate.weight": gate, "up.weight": up, "gate.bias": gate_bias, "up.bias": up_bias}
    slots = FFNSlots(rows | {"down.weight": down.weight.T}, down.bias)
    replace_leaves(holder, spec, slots, None, None)
    slots.apply(plan_switch(slots.order, ids))
    slots.activate(len(ids))
    assert np.abs(np.array(ffn(x) - expected)).max() < 1e-5


def test_looking_for_ffns_evaluates_no_weights_and_changes_nothing() -> None:
    # 8 TB of parameters, which nobody could evaluate.
    config = tiny_config("llama")
    assert config is not None
    config |= {"hidden_size": 65536, "intermediate_size": 1 << 20, "num_attention_heads": 512, "head_dim": 128}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    before = [(path, type(module)) for path, module in model.named_modules()]
    assert widths_of(model, "llama") == [1 << 20] * 4
    assert [(path, type(module)) for path, module in model.named_modules()] == before


@pytest.mark.parametrize("model_type", ["phi3", "granitemoehybrid", "gemma4", "openelm"])
def test_quantized_checkpoints_of_odd_families_load_and_slice(tmp_path: Path, model_type: str) -> None:
    dense = write_family(tmp_path / "source", model_type)
    options = Options(quantization=quantization_of("affine", 32, 8))
    convert(open_source(tmp_path / "source"), tmp_path / "ifp", options)
    model = open_model(tmp_path / "ifp")
    plain = logits(dense, PROMPT)
    assert np.abs(logits(model, PROMPT) - plain).max() < 0.1 * np.abs(plain).max()  # 8 bits of random weights
    widths = widths_of(dense, model_type)
    selection = random_selection(widths, [keep_count(0.5, width) for width in widths], seed=3)
    model.switch(selection)
    mask(dense, tmp_path / "ifp", selection)
    expected = logits(dense, PROMPT)
    found = logits(model, PROMPT)
    assert np.abs(found - expected).max() < 0.1 * np.abs(plain).max()
    assert np.abs(found - expected).max() < 0.5 * np.abs(plain - expected).max()


@pytest.mark.parametrize("fused", [HALVES, INTERLEAVED])
@pytest.mark.parametrize("axis", [0, -1])
def test_joining_what_was_split_gives_the_same_rows(fused: str, axis: int) -> None:
    rows = mx.random.normal((12, 5))
    gate, up = split_fused(rows, fused)
    assert gate.shape == up.shape == (6, 5)
    joined = join_fused(gate if axis == 0 else gate.T, up if axis == 0 else up.T, fused, axis=axis)
    assert mx.array_equal(joined if axis == 0 else joined.T, rows)


class _Norm(nn.Module):
    """An FFN with a norm across its neurons, as no family that can be sliced has."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        hidden = nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden / mx.linalg.norm(hidden, axis=-1, keepdims=True))


class _GateOfTheInput(_Norm):
    """Three projections, one of which does not reach the hidden units one by one."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x).mean(axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", [_Norm, _GateOfTheInput])
def test_modules_that_look_like_ffns_are_tried_out(kind: type[nn.Module]) -> None:
    model = nn.Module()
    model.layers = [kind()]
    with pytest.raises(SourceError, match=MIXES):
        find_ffns(model, "odd")
