"""The safetensors reader and `open_source`: tiny folders on disk, whole ones and each way in which one can be wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, models

from ifprune_convert.readers import open_source
from ifprune_mlx.errors import SourceError

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def make_model(config: dict[str, Any]) -> Any:
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    return model


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def write_folder(
    path: Path,
    weights: dict[str, mx.array],
    config: dict[str, Any] = CONFIG,
    *,
    sharded: bool = False,
    index: bool = True,
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if not sharded:
        mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "pt"})
        return path
    weight_map = {name: SHARDS[number % 3] for number, name in enumerate(weights)}
    for shard in SHARDS:
        mx.save_safetensors(
            str(path / shard), {n: w for n, w in weights.items() if weight_map[n] == shard}, {"format": "mlx"}
        )
    if index:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.fixture
def weights() -> dict[str, mx.array]:
    return parameters(make_model(CONFIG))


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, mx.array]) -> Path:
    return write_folder(tmp_path / "source", weights)


@pytest.fixture
def sharded(tmp_path: Path, weights: dict[str, mx.array]) -> Path:
    return write_folder(tmp_path / "source", weights, sharded=True)


def refusal(path: Path, **options: bool) -> str:
    """The message with which a path is refused: one line that begins with the path or with a file in it."""
    with pytest.raises(SourceError) as caught:
        open_source(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def edit_config(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("layout", ["one", "sharded", "without index"])
def test_every_tensor_comes_back_bit_for_bit(
    tmp_path: Path, weights: dict[str, mx.array], dtype: mx.Dtype, layout: str
) -> None:
    stored = {name: weight.astype(dtype) for name, weight in weights.items()}
    # A buffer of old checkpoints, which the model class's `sanitize` drops.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(4)}
    path = write_folder(tmp_path / "m", stored | extra, sharded=layout != "one", index=layout == "sharded")
    source = open_source(path)
    assert (source.path, source.config["model_type"], source.licence) == (path, "llama", None)
    assert source.shapes == {name: tuple(weight.shape) for name, weight in weights.items()}
    for name, weight in stored.items():
        taken = source.take(name)
        assert taken.dtype == dtype
        assert mx.array_equal(taken, weight), name
    with pytest.raises(KeyError):
        source.take("model.norm.weight")


def test_names_and_layouts_are_those_of_the_model_class(tmp_path: Path) -> None:
    # gemma3 drops the vision tower, and its tied head from the model itself, while it sanitizes.
    text = {
        "model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
    }  # fmt: skip
    config = {"model_type": "gemma3", "vocab_size": 64, "text_config": text}
    stored = parameters(make_model(config))
    del stored["language_model.lm_head.weight"]
    source = open_source(write_folder(tmp_path / "m", stored | {"vision_tower.weight": mx.ones((2, 2))}, config))
    assert source.shapes == {name: tuple(weight.shape) for name, weight in stored.items()}
    for name, weight in stored.items():
        assert mx.array_equal(source.take(name), weight), name


def test_opening_reads_nothing_and_taking_keeps_nothing(tmp_path: Path) -> None:
    config = {**CONFIG, "intermediate_size": 4096}
    path = write_folder(tmp_path / "m", parameters(make_model(config)), config)
    mx.clear_cache()
    before = mx.get_active_memory()
    source = open_source(path)
    assert mx.get_active_memory() - before < 10_000
    taken = source.take("model.layers.0.mlp.up_proj.weight")
    assert taken.nbytes <= mx.get_active_memory() - before < taken.nbytes + 10_000
    del taken
    assert mx.get_active_memory() - before < 10_000


def test_a_part_of_a_fused_tensor_does_not_keep_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class, _ = _get_classes(CONFIG)
    weights = parameters(make_model(CONFIG))
    gate, up = (weights.pop(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up"))
    fused = mx.concatenate([gate, up])

    def split(self: Any, stored: dict[str, mx.array]) -> dict[str, mx.array]:
        both = stored.pop("fused")
        return stored | {
            "model.layers.0.mlp.gate_proj.weight": both[:48],
            "model.layers.0.mlp.up_proj.weight": both[48:],
        }

    monkeypatch.setattr(model_class, "sanitize", split)
    source = open_source(write_folder(tmp_path / "m", weights | {"fused": fused}))
    assert mx.array_equal(source.take("model.layers.0.mlp.gate_proj.weight"), gate)
    assert mx.array_equal(source.take("model.layers.0.mlp.up_proj.weight"), up)


def test_the_layout_of_the_hub_cache(tmp_path: Path, sharded: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    source = open_source(snapshot)
    assert source.take("lm_head.weight").shape == (64, 32)
    source.write_tokenizer(tmp_path)
    assert not (tmp_path / "tokenizer.json").is_symlink()
    # A download that was broken off leaves links to nothing.
    (snapshot / SHARDS[1]).resolve().unlink()
    assert f"lacks {SHARDS[1]}" in refusal(snapshot)


def test_weights_of_another_kind_beside_the_model_are_left_alone(folder: Path) -> None:
    mx.save_safetensors(str(folder / "consolidated.safetensors"), {"layers.0.w1": mx.ones((2, 2))}, {"format": "pt"})
    assert "lm_head.weight" in open_source(folder).shapes
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert f"several weight files and no {INDEX}" in refusal(folder)
    (folder / "consolidated.safetensors").unlink()
    assert "lm_head.weight" in open_source(folder).shapes


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: mit\n"}, "apache-2.0"),
        ({"README.md": "---\nlicense:\n  - mit\n---\n"}, "mit"),
        ({"README.md": '---\nlicense: "other"\nlicense_name: llama3.1\n---\n'}, "llama3.1"),
        ({"README.md": "# Model\nlicense: mit\n", "LICENSE": "\n  MIT License\n\nCopyright\n"}, "MIT License"),
        ({"LICENSE": "word " * 40}, None),
        ({}, None),
    ],
)
def test_licence(folder: Path, files: dict[str, str], licence: str | None) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    assert open_source(folder).licence == licence


def test_tokenizer_files_are_copied_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    copied = {
        "tokenizer.model": "\x00\x01", "special_tokens_map.json": "{}", "vocab.json": "{}", "merges.txt": "a b",
        "added_tokens.json": "{}", "chat_template.jinja": "{{ x }}", "chat_template.json": "{}",
        "generation_config.json": '{"eos_token_id": [1, 2]}',
    }  # fmt: skip
    for name, text in (copied | {"modeling_x.py": "raise SystemExit", "training_args.bin": "x"}).items():
        (folder / name).write_text(text)
    target = tmp_path / "out"
    target.mkdir()
    source = open_source(folder)
    source.write_tokenizer(target)
    assert {file.name for file in target.iterdir()} == {*copied, "tokenizer.json", "tokenizer_config.json"}
    assert all((target / file.name).read_bytes() == (folder / file.name).read_bytes() for file in target.iterdir())
    assert source.config["eos_token_id"] == [1, 2]
    (folder / "added_tokens.json").write_text("{")
    with pytest.raises(SourceError, match=r"added_tokens\.json: is not valid JSON"):
        source.write_tokenizer(target)


def test_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, "is quantized"),
        ({"ifpruning": {"format_version": 1}}, "is an IFP checkpoint already"),
        ({"model_type": "gpt9"}, "has no model_type 'gpt9'"),
        ({"model_type": "base"}, "has no model_type 'base'"),
        ({"model_type": "../x"}, "names no model_type"),
        ({"model_type": None}, "names no model_type"),
        ({"hidden_size": None}, "cannot build a llama model"),
        ({"hidden_size": "x"}, "cannot build a llama model"),
        ({"num_attention_heads": 0}, "cannot build a llama model"),
        ({"rope_scaling": {"type": "odd"}}, "cannot build a llama model"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has model.layers.1.input_layernorm.weight"),
        ({"intermediate_size": 64}, "mlp.gate_proj.weight has shape [48, 32], but the config asks for [64, 32]"),
        ({"attention_bias": True}, "and 5 more"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(folder, **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize("trust", [True, False])
def test_code_in_the_folder_is_never_run(folder: Path, trust: bool) -> None:
    (folder / "odd.py").write_text("raise SystemExit")
    edit_config(folder, model_file="odd.py")
    words = refusal(folder, trust_remote_code=trust)
    assert ("not supported yet" if trust else "never run") in words


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "\udc80", "[" * 100_000])
def test_a_malformed_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json: " in refusal(folder)


def test_a_malformed_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")
    assert "generation_config.json is not a JSON object" in refusal(folder)


def test_wrong_tensors(tmp_path: Path, weights: dict[str, mx.array]) -> None:
    path = tmp_path / "m"
    down = "model.layers.1.mlp.down_proj.weight"
    less = {name: weight for name, weight in weights.items() if name != down}
    assert f"lacks {down}," in refusal(write_folder(path, less))
    assert "has odd.weight," in refusal(write_folder(path, weights | {"odd.weight": mx.ones((2, 2))}))
    assert f"tensor {down} has shape [48, 32]" in refusal(write_folder(path, weights | {down: weights[down].T}))
    integers = weights | {down: weights[down].astype(mx.int8)}
    assert f"tensor {down} has type int8" in refusal(write_folder(path, integers))


def test_a_model_whose_sanitize_stumbles(tmp_path: Path, weights: dict[str, mx.array]) -> None:
    # mixtral's `sanitize` stacks the experts that it finds by name.
    config = {**CONFIG, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    experts = {"model.layers.0.block_sparse_moe.experts.0.w1.weight": mx.ones((2, 2))}
    assert "mlx-lm cannot arrange the tensors of this mixtral model" in refusal(
        write_folder(tmp_path / "m", weights | experts, config)
    )


def drop_shard(path: Path) -> None:
    (path / SHARDS[1]).unlink()


def cut_shard(path: Path) -> None:
    (path / SHARDS[1]).write_bytes((path / SHARDS[1]).read_bytes()[:-7])


def garble_shard(path: Path) -> None:
    (path / SHARDS[1]).write_bytes(b"not a header at all")


def save(path: Path, weights: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(path), weights, {"format": "mlx"})


def stale_shard(path: Path) -> None:
    weights = mx.load(str(path / SHARDS[1]))
    assert isinstance(weights, dict)
    save(path / SHARDS[1], weights | {"lm_head.weight": mx.ones((64, 32))})


def short_shard(path: Path) -> None:
    save(path / SHARDS[1], {"odd": mx.ones(3)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_shard, f"lacks {SHARDS[1]}; download"),
        (cut_shard, f"{SHARDS[1]}: cut short"),
        (garble_shard, f"{SHARDS[1]}: not a safetensors file"),
        (stale_shard, "tensor lm_head.weight is in both "),
        (short_shard, f"{SHARDS[1]}: lacks model."),
        (lambda path: (path / INDEX).write_text("{"), "is not an index"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {}}'), "is not an index"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"a": 3}}'), "is not an index"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"a": ["b"]}}'), "is not an index"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}'), "is not an index"),
    ],
)
def test_damaged_shards(sharded: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(sharded)
    assert words in refusal(sharded)


def test_shards_are_counted_without_an_index_too(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    drop_shard(sharded)
    assert f"lacks {SHARDS[1]}; download" in refusal(sharded)


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    for cut in [*range(0, len(content), len(content) // 50), len(content) - 1]:
        (folder / "model.safetensors").write_bytes(content[:cut])
        assert "model.safetensors: " in refusal(folder)


def test_a_file_that_vanishes_after_opening(folder: Path) -> None:
    source = open_source(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"tensor lm_head\.weight cannot be read"):
        source.take("lm_head.weight")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "safetensors or GGUF" in refusal(path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "Python pickles" in refusal(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path: Path, folder: Path) -> None:
    assert "named by its id, ORG/NAME" in refusal(tmp_path / "org" / "name")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "no such file or folder" in refusal(tmp_path / "link")
    assert "pass the folder" in refusal(folder / "model.safetensors")
    assert "not a checkpoint" in refusal(folder / "config.json")
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    assert f"pass one of them, e.g. {folder / 'model.gguf'}" in refusal(folder)
    assert "is not a GGUF file" in refusal(folder / "model.gguf")
    (folder / "model.gguf").unlink()
    assert "no weights here" in refusal(folder)
