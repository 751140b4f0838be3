"""PEFT adapters fused while converting, against a reference in NumPy; `tests/heavy/test_peft.py` asks PEFT itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from ifprune_convert import fusing
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, load
from ifprune_mlx.errors import SourceError
from tests.convert.tiny_peft import PREFIX, write_peft
from tests.family_configs import OLD_MLX_LM, write_family
from tests.tiny import CONFIGS, make_model, write_source, write_tokenizer

TOKENS = mx.array([[5, 9, 77, 300, 12, 41]])
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
SIZES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (64, 128), "mlp.up_proj": (64, 128), "mlp.down_proj": (128, 64),
}  # fmt: skip
ALL = {f"model.layers.{layer}.{name}": (4, *sizes) for layer in range(2) for name, sizes in SIZES.items()}
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"


def read(file: Path) -> Arrays:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return {name: np.array(array).astype(np.float64) for name, array in loaded.items()}


def expected(source: Path, adapter: Path, scales: dict[str, float]) -> mx.array:
    """Logits of mlx-lm's model with weights fused here, in float64.

    Args:
        scales: of modules by the end of their names; the first that fits.
    """
    weights, tensors = read(source / "model.safetensors"), read(adapter / "adapter_model.safetensors")
    tensors = {name.removeprefix(PREFIX).replace(".base_layer.", "."): array for name, array in tensors.items()}
    weights |= {name: array for name, array in tensors.items() if name in weights}
    for name, first in tensors.items():
        for ending in (".lora_A.weight", ".lora_embedding_A"):
            if not name.endswith(ending):
                continue
            stem = name.removesuffix(ending)
            scale = next(scale for end, scale in scales.items() if stem.endswith(end))
            delta = scale * tensors[stem + ending.replace("A", "B")] @ first
            if stem + ".weight" not in weights:  # a tied output layer
                continue
            changed = weights[f"{stem}.weight"] + (delta.T if "embedding" in ending else delta)
            if (magnitude := tensors.get(f"{stem}.lora_magnitude_vector")) is not None:
                changed = magnitude[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)
            weights[f"{stem}.weight"] = changed
            if (offset := tensors.get(f"{stem}.lora_B.bias")) is not None:
                weights[f"{stem}.bias"] = weights[f"{stem}.bias"] + scale * offset
    model, _ = load_model(source)
    base = model(TOKENS)
    model.load_weights([(name, mx.array(array.astype(np.float32))) for name, array in weights.items()])
    logits = model(TOKENS)
    assert float(mx.abs(logits - base).max()) > 0.1
    return logits


def converted(source: Path, adapter: Path, out: Path) -> Checkpoint:
    return convert(open_source(source), out, Options(adapter=adapter)).checkpoint


def check(source: Path, adapter: Path, out: Path, scales: dict[str, float]) -> None:
    model, _ = load(converted(source, adapter, out).path)
    found = model(TOKENS)
    mx.eval(found)
    model.close()
    wanted = expected(source, adapter, scales)
    assert float(mx.abs(found - wanted).max()) < 2e-5 * max(float(mx.abs(wanted).max()), 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 12 / 4), ({"use_rslora": True}, 12 / 2), ({"use_dora": True}, 3.0), ({"fan_in_fan_out": True}, 3.0)],
    ids=["plain", "rslora", "dora", "fan-in-fan-out"],
)
def test_low_rank(tmp_path: Path, family: str, config: dict[str, Any], scale: float) -> None:
    source = write_source(tmp_path / "source", family)
    check(source, write_peft(tmp_path / "adapter", ALL, **config), tmp_path / "out", {"": scale})


def test_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_CHUNK", 1000)
    source = write_source(tmp_path / "source")
    check(source, write_peft(tmp_path / "adapter", ALL, use_dora=True), tmp_path / "out", {"": 3.0})


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    modules = {UP: (4, 64, 128), DOWN: (8, 128, 64), "model.layers.0.self_attn.q_proj": (2, 64, 64)}
    patterns = {
        "rank_pattern": {"down_proj": 8, r"layers\.\d+\.self_attn\.[qk]_proj": 2, "proj": 77},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 3, "layers.0.mlp.down_proj": 4.0, "p_proj": 77},
    }
    adapter = write_peft(tmp_path / "adapter", modules, **patterns)
    scales = {"up_proj": 3 / 4, "down_proj": 4 / 8, "q_proj": 12 / 2}
    check(write_source(tmp_path / "source"), adapter, tmp_path / "out", scales)


def test_biases(tmp_path: Path) -> None:
    """Trained along (`bias`), or beside lora_B (`lora_bias`)."""
    source = write_source(tmp_path / "source", "llama-bias")
    more = {f"{UP}.base_layer.bias": (128,), "model.layers.0.self_attn.k_proj.bias": (32,)}
    check(source, write_peft(tmp_path / "along", {UP: (4, 64, 128)}, more, bias="all"), tmp_path / "out", {"": 3.0})
    more = {f"{UP}.lora_B.bias": (128,)}
    check(source, write_peft(tmp_path / "beside", {UP: (4, 64, 128)}, more, lora_bias=True), tmp_path / "2", {"": 3.0})
    more |= {f"{UP}.base_layer.bias": (128,)}
    check(source, write_peft(tmp_path / "both", {UP: (4, 64, 128)}, more, lora_bias=True), tmp_path / "3", {"": 3.0})


def test_whole_modules(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama-untied")
    more = {"lm_head.weight": (320, 64), "model.embed_tokens.weight": (320, 64)}
    adapter = write_peft(tmp_path / "adapter", {UP: (4, 64, 128)}, more, modules_to_save=["lm_head", "embed_tokens"])
    check(source, adapter, tmp_path / "out", {"": 3.0})


def embedding(output: bool) -> tuple[dict[str, tuple[int, int, int]], dict[str, tuple[int, ...]]]:
    """Modules and more tensors: an adapted embedding that is saved too, and an output layer likewise."""
    more: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.lora_embedding_A": (4, 320),
        "model.embed_tokens.lora_embedding_B": (64, 4),
        "model.embed_tokens.base_layer.weight": (320, 64),
    }
    return ({"lm_head": (4, 64, 320)} if output else {}), more | (
        {"lm_head.base_layer.weight": (320, 64)} if output else {}
    )


def test_embeddings(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama-untied")
    check(source, write_peft(tmp_path / "adapter", *embedding(True)), tmp_path / "out", {"": 3.0})


def tie(folder: Path) -> None:
    """Make the output layer's tensors those of the embedding, as PEFT's `ensure_weight_tying` does."""
    edit(
        lambda tensors: tensors.update(
            {
                f"{PREFIX}lm_head.lora_A.weight": tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"].T,
                f"{PREFIX}lm_head.lora_B.weight": tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"].T,
                f"{PREFIX}lm_head.base_layer.weight": tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"],
            }
        )
    )(folder)


def test_tied_embeddings_change_as_one_or_not_at_all(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen2")
    alone = write_peft(tmp_path / "alone", *embedding(False))
    apart = write_peft(tmp_path / "apart", *embedding(True))
    for adapter in (alone, apart):
        with pytest.raises(SourceError, match=r"embed_tokens\.weight alone, which this model uses as its output"):
            converted(source, adapter, tmp_path / "out")
    tie(apart)
    check(source, apart, tmp_path / "out", {"": 3.0})
    more = {"lm_head.weight": (320, 64)}
    only = write_peft(tmp_path / "only", {UP: (4, 64, 128)}, more, modules_to_save=["lm_head"])
    with pytest.raises(SourceError, match=r"changes lm_head\.weight, which the model in mlx-lm does not have"):
        converted(source, only, tmp_path / "again")


@pytest.mark.skipif(OLD_MLX_LM, reason="the mistral3 of mlx-lm 0.31 takes one place only")
def test_names_that_mlx_lm_changes(tmp_path: Path) -> None:
    """Mistral 3's language model lies elsewhere in PyTorch; mlx-lm's `sanitize` knows where."""
    config = {"model_type": "mistral3", "text_config": CONFIGS["llama"] | {"head_dim": 16}}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(make_model(config).parameters()))
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
    write_tokenizer(source)
    modules = {name.replace("model.", "model.language_model."): sizes for name, sizes in ALL.items()}
    adapter = write_peft(tmp_path / "adapter", modules)
    twin = tmp_path / "twin"
    shutil.copytree(adapter, twin)
    edit(
        lambda tensors: [
            tensors.update({name.replace("model.language_model.", "language_model.model."): tensors.pop(name)})
            for name in list(tensors)
        ]
    )(twin)
    wanted = expected(source, twin, {"": 3.0})
    model, _ = load(converted(source, adapter, tmp_path / "out").path)
    assert float(mx.abs(model(TOKENS) - wanted).max()) < 1e-4
    model.close()
    vision = write_peft(tmp_path / "vision", {"model.vision_tower.layers.0.attention.q_proj": (4, 64, 64)})
    with pytest.raises(SourceError, match=r"changes model\.vision_tower\S+, which the model in mlx-lm does not have"):
        converted(source, vision, tmp_path / "again")


def test_families_that_scale_their_weights_are_refused(tmp_path: Path) -> None:
    """mlx-lm multiplies Falcon-H1's weights while loading: what an adapter adds in PyTorch is not what it adds here."""
    write_family(tmp_path / "source", "falcon_h1")
    adapter = write_peft(tmp_path / "adapter", {"model.layers.0.feed_forward.gate_proj": (4, 64, 128)})
    with pytest.raises(SourceError, match="which the model in mlx-lm does not have"):
        converted(tmp_path / "source", adapter, tmp_path / "out")


def test_the_manifest_names_the_adapter(tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "my-adapter", {UP: (4, 64, 128)})
    out = converted(write_source(tmp_path / "source"), adapter, tmp_path / "out")
    assert out.manifest["source"] == "source + adapter my-adapter"


# What is refused.


def edit(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(file), tensors)

    return spoil


def put(name: str, array: mx.array) -> Callable[[Path], object]:
    return edit(lambda tensors: tensors.update({name: array}))


def setting(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | changes)
    )


A, B = f"{PREFIX}{UP}.lora_A.weight", f"{PREFIX}{UP}.lora_B.weight"
DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind": (setting(peft_type="IA3"), "is a PEFT adapter of type 'IA3', and only LORA .* merge it"),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"adapter_model\.bin\) are a Python pickle, .* safe_serialization",
    ),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "an empty file": (edit(lambda tensors: tensors.clear()), "holds no tensors"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "replicated layers": (setting(layer_replication=[[0, 2]]), "sets layer_replication, which cannot be fused"),
    "activated LoRA": (setting(alora_invocation_tokens=[1]), "sets alora_invocation_tokens"),
    "trained tokens": (setting(trainable_token_indices=[7]), "sets trainable_token_indices"),
    "a setting of the future": (setting(use_newlora=True), "sets use_newlora, which cannot be fused here; merge it"),
    "a start that changes the model": (setting(init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changed the model"),
    "rank 0": (setting(r=0), "no whole number above 0"),
    "a rank that is text": (setting(rank_pattern={"up_proj": "4"}), "no whole number above 0"),
    "no alpha": (setting(lora_alpha=None), "no finite number"),
    "an infinite alpha": (setting(alpha_pattern={"up_proj": math.inf}), "no finite number"),
    "patterns in a list": (setting(rank_pattern=["up_proj"]), "rank_pattern is not a JSON object"),
    "a pattern that is none": (setting(rank_pattern={"up_proj(": 4}), "no regular expression"),
    "another rank": (setting(r=8), r"do not fit one another and a rank of 8"),
    "DoRA without magnitudes": (setting(use_dora=True), f"has a, b of {UP}, where .* asks for a, b, magnitude"),
    "magnitudes without DoRA": (put(f"{PREFIX}{UP}.lora_magnitude_vector", mx.ones(128)), "has a, b, magnitude of"),
    "half a pair": (edit(lambda tensors: tensors.pop(A)), f"has b of {UP}, where"),
    "no prefix": (put(f"{UP}.lora_A.weight", mx.ones((4, 64))), "of a kind that cannot be fused here"),
    "an unknown tensor": (put(f"{PREFIX}{UP}.lora_C.scale", mx.ones(4)), r"lora_C\.scale is of a kind"),
    "both ways": (
        edit(
            lambda tensors: tensors.update({f"{PREFIX}{UP}{e}.weight": mx.ones((128, 64)) for e in ("", ".base_layer")})
        ),
        "holds both",
    ),
    "integers": (put(A, mx.ones((4, 64), mx.int32)), "has type I32, not a float type"),
    "a vector": (put(A, mx.ones(64)), "do not fit one another"),
    "NaN": (put(B, mx.full((128, 4), math.nan)), r"lora_B\.weight contains NaN or infinity"),
    "a wider model's": (
        edit(lambda tensors: tensors.update({A: mx.ones((4, 96)), B: mx.ones((192, 4))})),
        r"as one of shape \[192, 96\], but the model's is \[128, 64\]",
    ),
    "a deeper model's": (
        edit(lambda t: t.update({n.replace("layers.1", "layers.7"): t.pop(n) for n in list(t)})),
        r"changes model\.layers\.7\.mlp\.up_proj\.weight, which the model in mlx-lm does not have",
    ),
    "a classifier": (put(f"{PREFIX}score.weight", mx.ones((2, 64))), r"changes score\.weight"),
    "a norm": (put(f"{PREFIX}model.norm.weight", mx.ones(64)), r"model\.norm, a RMSNorm, and only linear"),
    "a bias that the model lacks": (put(f"{PREFIX}{UP}.bias", mx.ones(128)), rf"changes {UP}\.bias, which"),
    "DoRA on an embedding": (
        lambda folder: (
            setting(use_dora=True)(folder),
            edit(
                lambda tensors: (
                    tensors.clear(),
                    tensors.update(
                        {
                            f"{PREFIX}model.embed_tokens.lora_embedding_A": mx.ones((4, 320)),
                            f"{PREFIX}model.embed_tokens.lora_embedding_B": mx.ones((64, 4)),
                            f"{PREFIX}model.embed_tokens.lora_magnitude_vector": mx.ones(64),
                        }
                    ),
                )
            )(folder),
        ),
        "by DoRA, which cannot be fused",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_refused_in_one_line(tmp_path: Path, defect: str) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_peft(tmp_path / "adapter", {UP: (4, 64, 128)})
    spoil, reason = DEFECTS[defect]
    spoil(adapter)
    with pytest.raises(SourceError, match=reason) as caught:
        converted(source, adapter, tmp_path / "out")
    assert str(caught.value).startswith(str(adapter))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
