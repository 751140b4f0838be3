"""Adapters fused while converting: the checkpoint gives what mlx-lm gives of model and adapter."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import lora
from mlx_lm.utils import load as load_with_adapter
from mlx_lm.utils import load_model

from ifprune_convert import fusing
from ifprune_convert.adapter import open_adapter
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_convert.skeleton import build_skeleton
from ifprune_mlx import Checkpoint, Selection, load
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.errors import SourceError
from tests.cli.process import run
from tests.convert.tiny_adapter import write_adapter
from tests.family_configs import write_family
from tests.tiny import CONFIGS, write_source
from tests.tiny_gguf import CONFIG as GGUF_CONFIG
from tests.tiny_gguf import make_model, write_gguf

TOKENS = mx.array([[5, 9, 77, 300, 12, 41]])
QUERY = "model.layers.1.self_attn.q_proj"


def arrays(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def converted(source: Path, adapter: Path | None, out: Path, **options: Any) -> Checkpoint:
    return convert(open_source(source), out, Options(adapter=adapter, **options)).checkpoint


def logits(checkpoint: Checkpoint) -> mx.array:
    """Of the checkpoint's dense model."""
    model, _ = load(checkpoint.path)
    result = model(TOKENS)
    mx.eval(result)
    model.close()
    return result


def difference(one: mx.array, other: mx.array) -> float:
    return float(mx.abs(one - other).max())


def check(source: Path, adapter: Path, out: Path) -> None:
    """The checkpoint's logits are mlx-lm's of model and adapter, and the adapter is one that shows."""
    expected = load_with_adapter(str(source), adapter_path=str(adapter))[0](TOKENS)
    base = load_model(source)[0](TOKENS)
    assert difference(expected, base) > 0.1
    assert difference(logits(converted(source, adapter, out)), expected) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3", "gemma2"])
def test_fused_is_what_mlx_lm_computes(tmp_path: Path, family: str, kind: str) -> None:
    source = write_source(tmp_path / "source", family)
    check(source, write_adapter(tmp_path / "adapter", source, kind), tmp_path / "out")


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "none"])
@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "gemma2"])
def test_gains_beside_an_adapter(tmp_path: Path, family: str, kind: str) -> None:
    """Each neuron's activation is multiplied by its gain, after what the adapter does to the weights."""
    source = write_source(tmp_path / "source", family)
    adapter = write_adapter(tmp_path / "adapter", source, "lora" if kind == "none" else kind)
    model = load_with_adapter(str(source), adapter_path=str(adapter))[0]
    if kind == "none":
        (adapter / "adapters.safetensors").unlink()
        (adapter / "adapter_config.json").write_text('{"fine_tune_type": "none"}')
        model = load_model(source)[0]
    gains = {}
    for index, layer in enumerate(model.layers):
        down = layer.mlp.down_proj
        width = load_model(source)[0].layers[index].mlp.down_proj.weight.shape[1]
        gains[f"model.layers.{index}.mlp.down_proj.gain"] = gain = mx.random.uniform(0.5, 1.5, (width,))
        layer.mlp.down_proj = lambda x, down=down, gain=gain: down(x * gain)
    mx.save_safetensors(str(adapter / "gains.safetensors"), gains)
    assert difference(logits(converted(source, adapter, tmp_path / "out")), model(TOKENS)) < 1e-4
    assert difference(load_model(source)[0](TOKENS), model(TOKENS)) > 0.05


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("model.layers.0.mlp.down_proj.gain", 3, "not this model's"),
        ("model.layers.9.mlp.down_proj.gain", 3, "which the model does not have"),
        ("model.layers.0.mlp.down_proj.weight", 3, "is none of gain"),
    ],
)
def test_gains_of_another_model_are_refused(tmp_path: Path, name: str, size: int, words: str) -> None:
    source = write_source(tmp_path / "source", "llama")
    adapter = write_adapter(tmp_path / "adapter", source)
    mx.save_safetensors(str(adapter / "gains.safetensors"), {name: mx.ones(size)})
    with pytest.raises(SourceError, match=words):
        converted(source, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_embeddings_and_output_layers(tmp_path: Path, family: str, kind: str) -> None:
    source = write_source(tmp_path / "source", family)
    keys = ["mlp.down_proj", "model.embed_tokens", *(["lm_head"] if family == "llama-untied" else [])]
    adapter = write_adapter(tmp_path / "adapter", source, kind, layers=1, keys=keys)
    assert len(arrays(adapter / "adapters.safetensors")) == len(keys) * (2 if kind == "lora" else 3)
    check(source, adapter, tmp_path / "out")


def test_what_mlx_lm_trained(tmp_path: Path) -> None:
    """`mlx_lm.lora` itself, for two steps."""
    source, data = write_source(tmp_path / "source"), tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text('{"prompt": "one two", "completion": "three"}\n' * 2)
    settings = {
        "model": str(source), "train": True, "data": str(data), "iters": 2, "batch_size": 2, "val_batches": 1,
        "num_layers": -1, "learning_rate": 0.01, "adapter_path": str(tmp_path / "adapter"),
    }  # fmt: skip
    lora.run(types.SimpleNamespace(**(lora.CONFIG_DEFAULTS | settings)))
    check(source, tmp_path / "adapter", tmp_path / "out")


def test_an_old_config_that_names_no_kind(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", source)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["fine_tune_type"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    check(source, adapter, tmp_path / "out")


def test_only_what_the_adapter_holds_is_changed(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen2")
    adapter = write_adapter(tmp_path / "adapter", source, layers=1, keys=["self_attn.q_proj", "mlp.up_proj"])
    plain, fused = (converted(source, given, tmp_path / f"out-{bool(given)}") for given in (None, adapter))
    changed = set()
    for name in plain.manifest["files"]:
        if name.endswith(".safetensors") and name != "priors.safetensors":
            one, two = arrays(plain.path / name), arrays(fused.path / name)
            assert one.keys() == two.keys()
            changed |= {f"{name.split('-of-')[0]} {key}" for key in one if not mx.array_equal(one[key], two[key])}
    assert changed == {"neurons-00002 gate_up.weight", "model-00001 model.layers.1.self_attn.q_proj.weight"}
    # The prior from the weights is that of the fused ones.
    one, two = arrays(plain.priors_file), arrays(fused.priors_file)
    assert {name for name in one if not mx.array_equal(one[name], two[name])} == {"prior.1"}


def test_large_weights_are_fused_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_CHUNK", 1000)
    source = write_source(tmp_path / "source")
    check(source, write_adapter(tmp_path / "adapter", source, "dora"), tmp_path / "out")


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    weights = arrays(source / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3] = 0
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
    adapter = write_adapter(tmp_path / "adapter", source, "dora", noise=0)
    fused = converted(source, adapter, tmp_path / "out")
    assert difference(logits(fused), load_model(source)[0](TOKENS)) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fusing_comes_before_quantizing(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", source, kind)
    quantization = Quantization(32, 4, "affine")
    fused = converted(source, adapter, tmp_path / "out", quantization=quantization)
    plain = converted(source, adapter, tmp_path / "plain")
    for index in range(2):
        packed, dense = arrays(fused.neurons_file(index)), arrays(plain.neurons_file(index))
        for name in ("gate_up", "down"):
            expected = mx.quantize(dense[f"{name}.weight"], group_size=32, bits=4)
            for leaf, array in zip(("weight", "scales", "biases"), expected, strict=True):
                assert mx.array_equal(packed[f"{name}.{leaf}"], array)
    rest, dense = (arrays(each.path / "model-00001-of-00001.safetensors") for each in (fused, plain))
    for leaf, array in zip(("weight", "scales", "biases"), mx.quantize(dense[f"{QUERY}.weight"], 32, 4), strict=True):
        assert mx.array_equal(rest[f"{QUERY}.{leaf}"], array)


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16])
def test_fused_in_float32_and_rounded_once(tmp_path: Path, stored: mx.Dtype) -> None:
    source = write_source(tmp_path / "source")
    weights = {name: array.astype(stored) for name, array in arrays(source / "model.safetensors").items()}
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
    adapter = write_adapter(tmp_path / "adapter", source)
    trained = arrays(adapter / "adapters.safetensors")
    delta = 10.0 * (trained[f"{QUERY}.lora_b"].T @ trained[f"{QUERY}.lora_a"].T)
    exact = weights[f"{QUERY}.weight"].astype(mx.float32) + delta
    for dtype in (None, mx.float32):
        out = converted(source, adapter, tmp_path / f"out-{dtype is None}", dtype=dtype)
        found = arrays(out.path / "model-00001-of-00001.safetensors")[f"{QUERY}.weight"]
        assert found.dtype == (dtype or stored)
        assert mx.allclose(found, exact.astype(found.dtype), rtol=1e-5, atol=1e-6)


def test_a_full_adapter_takes_the_type_of_the_model(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", source, "full", layers=1)
    trained = arrays(adapter / "adapters.safetensors")
    assert {name.split(".")[2] for name in trained} == {"1"}
    out = converted(source, adapter, tmp_path / "out", dtype=mx.bfloat16)
    rest = arrays(out.path / "model-00001-of-00001.safetensors")
    assert {array.dtype for array in rest.values()} == {mx.bfloat16}
    for name in (f"{QUERY}.weight", "model.layers.1.input_layernorm.weight"):
        assert mx.array_equal(rest[name], trained[name].astype(mx.bfloat16))


def test_a_gguf_source(tmp_path: Path) -> None:
    """llama.cpp keeps query and key rows in another order, which is undone before the adapter is fused."""
    config = {**GGUF_CONFIG, "model_type": "llama"}
    model = make_model(config)
    file = write_gguf(tmp_path / "model.gguf", config, model)
    source = write_source(
        tmp_path / "source", **{key: value for key, value in config.items() if key in CONFIGS["llama"]}
    )
    model.save_weights(str(source / "model.safetensors"))
    adapter = write_adapter(tmp_path / "adapter", source)
    expected = load_with_adapter(str(source), adapter_path=str(adapter))[0](TOKENS % config["vocab_size"])
    model, _ = load(converted(file, adapter, tmp_path / "out", dtype=mx.float32).path)
    assert difference(model(TOKENS % config["vocab_size"]), expected) < 1e-4
    model.close()


def test_the_manifest_names_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "my-adapter", source)
    out = converted(source, adapter, tmp_path / "out")
    assert out.manifest["source"] == "source + adapter my-adapter"
    assert out.verify() == []
    monkeypatch.chdir(adapter)
    assert converted(source, Path(), tmp_path / "again").manifest == out.manifest | {
        "created": Checkpoint.open(tmp_path / "again").manifest["created"]
    }


def test_every_tensor_is_used_and_none_stays(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", folder)
    source = open_source(folder)
    opened = open_adapter(adapter, build_skeleton(folder, source.config, len(source.shapes)), source.shapes)
    changed = [name for name in source.shapes if name in opened]
    assert len(changed) == 2 * 7
    for name in changed:
        assert opened.fuse(name, source.take(name), mx.float32).shape == source.shapes[name]
        assert name not in opened


def test_what_overflows_is_found_where_it_does(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", source, scale=1e8)
    words = r"adapter: fused into model\.layers\.0\.mlp\.\w+\.weight, it gives NaN or infinity as float16; choose"
    with pytest.raises(SourceError, match=words):
        converted(source, adapter, tmp_path / "out", dtype=mx.float16)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "source"]


def test_an_adapter_and_a_ready_prior_through_the_command_line(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen2")
    adapter = write_adapter(tmp_path / "adapter", source)
    # By this prior, the second half of each FFN's neurons matters most.
    ready = {f"prior.{index}": mx.arange(128, dtype=mx.float32) for index in range(2)}
    mx.save_safetensors(str(tmp_path / "prior.safetensors"), ready)
    out, cache, selection = tmp_path / "out", tmp_path / "cache", tmp_path / "selection.safetensors"
    options = ["--adapter", adapter, "--prior", tmp_path / "prior.safetensors", "--json"]
    done = run("convert", "--model", source, "--mlx-path", out, *options, cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["path"] == str(out)
    assert Checkpoint.open(out).manifest["source"] == "source + adapter adapter"
    expected = load_with_adapter(str(source), adapter_path=str(adapter))[0](TOKENS)
    assert difference(logits(Checkpoint.open(out)), expected) < 1e-5
    options = ["--prompt", "hello", "--selector", "static", "--density", "0.5", "--save-to", selection]
    assert run("select", "--model", out, *options, cache=cache).returncode == 0
    assert [ids.tolist() for ids in Selection.load(selection).ids] == [list(range(64, 128))] * 2


# What is refused; `tests/cli/bad_input` has the commonest through the command line.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_parameters": None}, "no whole number `rank`"),
        ({"lora_parameters": {"rank": True, "scale": 1.0}}, "no whole number `rank`"),
        ({"lora_parameters": {"rank": 4, "alpha": 16}}, "no finite number `scale`"),
        ({"lora_parameters": {"rank": 4, "scale": "10"}}, "no finite number `scale`"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "no finite number `scale`"),
        ({"lora_parameters": {"rank": 4, "scale": 10**400}}, "no finite number `scale`"),
        ({"lora_parameters": {"rank": 8, "scale": 10.0}}, r"\[\d+, 4\], but this model and a rank of 8"),
        ({"fine_tune_type": ["lora"]}, r"fine_tune_type \['lora'\] is not known"),
        ({"fine_tune_type": "dora"}, r"lacks model\.layers\.\S+\.m, .* and 11 more"),
        ({"fine_tune_type": "full"}, r"replaces model\.layers\.\S+\.lora_a, .* and 25 more"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", source)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(SourceError, match=rf"{adapter}.*{words}"):
        converted(source, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.clear(), "holds no tensors"),
        (lambda tensors: tensors.update({f"{QUERY}.m": mx.zeros((64,))}), "is none of lora_a, lora_b"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_a": mx.zeros((64, 4), mx.int32)}), "I32, not a float type"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_a": mx.zeros((4, 64))}), r"\[4, 64\].* ask for \[64, 4\]"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_b": mx.zeros((256,))}), r"\[256\].* ask for \[4, 64\]"),
        (
            lambda tensors: tensors.update({f"model.norm.{leaf}": mx.zeros((64, 4)) for leaf in ("lora_a", "lora_b")}),
            r"model\.norm, a RMSNorm, and only linear layers and embeddings",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    source = write_source(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", source)
    tensors = arrays(adapter / "adapters.safetensors")
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)
    with pytest.raises(SourceError, match=f"{adapter / 'adapters.safetensors'}: .*{words}"):
        converted(source, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_layer_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Gemma 3's class has an `lm_head` until its weights are loaded, also where it is tied to the embedding."""
    write_family(tmp_path / "source", "gemma3_text")
    weights = mx.load(str(tmp_path / "source" / "model.safetensors"))
    del weights["lm_head.weight"]
    mx.save_safetensors(str(tmp_path / "source" / "model.safetensors"), weights, {"format": "mlx"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"),
        {"lm_head.lora_a": mx.zeros((64, 4)), "lm_head.lora_b": mx.zeros((4, 320))},
    )
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="changes lm_head, whose weights the model does not have"):
        convert(open_source(tmp_path / "source"), tmp_path / "out", Options(adapter=adapter))
