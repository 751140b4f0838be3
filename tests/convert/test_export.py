"""An exported selection: stock mlx-lm computes with it what the sliced model does, and no packed byte changed."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model

from ifprune_convert import export
from ifprune_convert.export import Export, export_selection
from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_convert.pipeline import convert as run_convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, CheckpointError, IfpruneError, Selection, SelectionError
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.model import load_checkpoint
from tests.cli.process import run, start
from tests.family_configs import write_family
from tests.ifprune_mlx.reference import TOLERANCE, greedy, logits, open_model, random_selection
from tests.tiny import CONFIGS, write_checkpoint, write_source
from tests.tiny_predictor import write_predictor

PROMPT = [1, 40, 300, 7, 7, 99, 250, 3, 18, 120, 64, 201]
STEPS = [77, 5, 310]
PACKINGS = [None, ("affine", 64, 4), ("affine", 32, 8), ("mxfp4", 32, 4)]
INNER = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
WINDOW = {"sliding_window": 64, "sliding_window_pattern": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
# A config within the config; and a family whose last layers are twice as wide as its config says.
GEMMA3 = {
    "model_type": "gemma3",
    "vocab_size": 320,
    "text_config": {"model_type": "gemma3_text", **INNER, **WINDOW, "vocab_size": 320},
}
GEMMA4 = {
    "model_type": "gemma4_text", **INNER, **WINDOW, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "global_head_dim": 16, "vocab_size": 320, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def options(packing: tuple[str, int, int] | None, dtype: mx.Dtype | None = None) -> Options:
    return Options(quantization=None if packing is None else quantization_of(*packing), dtype=dtype)


def arrays(folder: Path, pattern: str = "model-*.safetensors") -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob(pattern)):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


def selection_of(folder: Path, keep: int | tuple[int, ...] = 40, seed: int = 5) -> Selection:
    widths = [spec.d_ffn for spec in Checkpoint.open(folder).layout.ffns]
    return random_selection(widths, keep if isinstance(keep, tuple) else [keep] * len(widths), seed)


def exported(folder: Path, selection: Selection, out: Path, **given: Any) -> Export:
    return export_selection(Checkpoint.open(folder), selection, out, **given)


def leftovers(out: Path) -> list[str]:
    return [entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")]


def check_same_answers(plain: Any, sliced: Any, tolerance: float = TOLERANCE) -> None:
    """The same logits, and the same greedy tokens up to where two tokens are as good as equal."""
    expected = logits(sliced, PROMPT, STEPS)
    assert np.abs(logits(plain, PROMPT, STEPS) - expected).max() < tolerance
    theirs, ours = greedy(plain, PROMPT, 24), greedy(sliced.module, PROMPT, 24)
    differing = [index for index, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b]
    if differing:
        best = np.sort(logits(sliced, PROMPT + ours[: differing[0]])[-1])
        assert best[-1] - best[-2] < 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint of a tiny llama. Do not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("float") / "checkpoint")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bit. Do not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("packed") / "checkpoint", options=options(("affine", 32, 4)))


# What is written.


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing[0]}-{packing[2]}" if packing else "float")
@pytest.mark.parametrize("family", CONFIGS)
def test_stock_mlx_lm_computes_what_the_sliced_model_does(
    tmp_path: Path, family: str, packing: tuple[str, int, int] | None
) -> None:
    folder, out = write_checkpoint(tmp_path / "checkpoint", family, options(packing)), tmp_path / "out"
    selection = selection_of(folder)
    done = exported(folder, selection, out)
    plain, config = load_model(out)
    assert config["intermediate_size"] == 40
    sliced = open_model(folder)
    sliced.switch(selection)
    check_same_answers(plain, sliced)
    # The other neurons are gone, not merely unused.
    assert done.parameters == sliced.active_parameters
    sliced.switch(None)
    assert np.abs(logits(sliced, PROMPT) - logits(plain, PROMPT)).max() > 100 * TOLERANCE
    sliced.close()

    # Everything but down is the checkpoint's, bit for bit.
    written, layout = arrays(out), Checkpoint.open(folder).layout
    for index, (spec, ids) in enumerate(zip(layout.ffns, selection.ids, strict=True), 1):
        rows = arrays(folder, f"neurons-{index:05d}-*")
        for part in ("weight", "scales", "biases", "bias"):
            both = [written.pop(f"{spec.path}.{leaf}.{part}", None) for leaf in (spec.gate, spec.up)]
            if (stored := rows.get(f"gate_up.{part}")) is None:
                assert both == [None, None]
                continue
            for array, column in zip(both, (0, 1), strict=True):
                assert array is not None
                assert array.dtype == stored.dtype
                assert mx.array_equal(array, stored[mx.array(ids), column])
        down = written.pop(f"{spec.path}.{spec.down}.weight")
        assert (down.shape, down.dtype) == ((64, 40), mx.float32)
        if packing is None:
            assert mx.array_equal(down, rows["down.weight"][mx.array(ids)].T)
        if spec.down_bias:
            assert mx.array_equal(written.pop(f"{spec.path}.{spec.down}.bias"), rows["down.bias"])
    rest = arrays(folder)
    assert written.keys() == rest.keys()
    assert all(array.dtype == rest[name].dtype for name, array in written.items())
    assert all(mx.array_equal(array, rest[name]) for name, array in written.items())


@pytest.mark.parametrize("config", [GEMMA3, GEMMA4], ids=lambda config: config["model_type"])
def test_a_config_that_says_widths_in_another_way(tmp_path: Path, config: dict[str, Any]) -> None:
    source = write_source_of(tmp_path / "source", config)
    folder = tmp_path / "checkpoint"
    run_convert(open_source(source), folder, Options())
    keep = (40, 40, 80, 80) if config is GEMMA4 else (40, 40)
    selection = selection_of(folder, keep)
    exported(folder, selection, tmp_path / "out")
    plain, written = load_model(tmp_path / "out")
    assert written.get("text_config", written)["intermediate_size"] == 40
    sliced = open_model(folder)
    sliced.switch(selection)
    check_same_answers(plain, sliced)
    with pytest.raises(SelectionError, match=r"keeps 40, 48 neurons.*no config of mlx-lm's gemma.*same number"):
        exported(folder, selection_of(folder, (40, 48) * (len(keep) // 2)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def write_source_of(folder: Path, config: dict[str, Any]) -> Path:
    """A dense folder of a family that is not among the tiny ones."""
    CONFIGS["other"] = config
    try:
        return write_source(folder, "other")
    finally:
        del CONFIGS["other"]


def test_the_other_files_of_the_folder(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    predictor = write_predictor(tmp_path / "predictor")
    folder, out = tmp_path / "checkpoint", tmp_path / "out"
    run_convert(open_source(source), folder, Options(predictor=predictor))
    write_manifest(folder, source="SmolLM", licence="apache-2.0")
    selection = selection_of(folder)
    done = exported(folder, selection, out)
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {file.name for file in out.iterdir()} == copied | {
        "config.json", "README.md", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    }  # fmt: skip
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in copied)
    assert load_tokenizer(out).eos_token == "<|im_end|>"
    dense = json.loads((folder / "config.json").read_text())
    del dense["ifpruning"]
    assert json.loads((out / "config.json").read_text()) == dense | {"intermediate_size": 40}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == arrays(out).keys()
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays(out).values())
    assert index["metadata"]["total_parameters"] == sum(array.size for array in arrays(out).values())
    assert done.bytes == sum(file.stat().st_size for file in out.iterdir())
    card = (out / "README.md").read_text()
    for words in (
        "library_name: mlx",
        'license: "apache-2.0"',
        "SmolLM",
        selection.hash,
        "random",
        "80 of 256 neurons",
    ):
        assert words in card


def test_packed_layers_are_named_as_mlx_lm_reads_them(tmp_path: Path, packed: Path) -> None:
    exported(packed, selection_of(packed), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    downs = {f"model.layers.{index}.mlp.down_proj": False for index in range(2)}
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"} | downs
    assert config["quantization_config"] == config["quantization"]


def test_an_export_of_everything_converts_back(tmp_path: Path, checkpoint: Path) -> None:
    exported(checkpoint, selection_of(checkpoint, 128), tmp_path / "out")
    again = run_convert(open_source(tmp_path / "out"), tmp_path / "again", Options()).checkpoint
    for pattern in ("model-*", "neurons-00001-*", "neurons-00002-*", "priors*"):
        before, after = arrays(checkpoint, pattern), arrays(again.path, pattern)
        assert before.keys() == after.keys()
        assert all(mx.array_equal(array, after[name]) for name, array in before.items())


@pytest.mark.parametrize("packing", PACKINGS[1:], ids=lambda packing: f"{packing[0]}-{packing[2]}")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_down_becomes_of_the_type_that_the_model_computes_in(
    tmp_path: Path, packing: tuple[str, int, int], dtype: mx.Dtype
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", options=options(packing, dtype))
    selection = selection_of(folder)
    exported(folder, selection, tmp_path / "out")
    written = arrays(tmp_path / "out")
    assert written["model.layers.1.mlp.down_proj.weight"].dtype == dtype
    assert written["model.norm.weight"].dtype == dtype
    # Half precision rounds otherwise; that the numbers are right shows in float32.
    plain, _ = load_model(tmp_path / "out")
    plain.set_dtype(mx.float32)
    sliced = load_checkpoint(Checkpoint.open(folder), dtype=mx.float32)
    sliced.switch(selection)
    assert np.abs(logits(plain, PROMPT) - logits(sliced, PROMPT)).max() < 2e-2


@pytest.mark.parametrize("packing", [None, ("affine", 32, 4), ("mxfp4", 32, 4)])
def test_dtype_casts_as_loading_does(tmp_path: Path, packing: tuple[str, int, int] | None) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", options=options(packing, mx.bfloat16))
    selection = selection_of(folder)
    exported(folder, selection, tmp_path / "out", dtype=mx.float32)
    plain, _ = load_model(tmp_path / "out")
    sliced = load_checkpoint(Checkpoint.open(folder), dtype=mx.float32)
    sliced.switch(selection)
    check_same_answers(plain, sliced)


@pytest.mark.parametrize("packing", [("affine", 32, 8), ("mxfp4", 32, 4)], ids=lambda packing: packing[0])
def test_down_quantized_anew(tmp_path: Path, packing: tuple[str, int, int]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", options=options(packing))
    selection = selection_of(folder, 64)
    exported(folder, selection, tmp_path / "float")
    done = exported(folder, selection, tmp_path / "packed", requantize_down=True)
    assert done.quantization == quantization_of(*packing).to_dict()
    floats, anew = arrays(tmp_path / "float"), arrays(tmp_path / "packed")
    name, (mode, group_size, bits) = "model.layers.1.mlp.down_proj", packing
    expected = mx.quantize(floats[f"{name}.weight"], group_size=group_size, bits=bits, mode=mode)
    for part, array in zip(("weight", "scales", "biases"), expected, strict=False):
        assert mx.array_equal(anew[f"{name}.{part}"], array)
    plain, _ = load_model(tmp_path / "packed")
    if bits == 8:
        sliced = open_model(folder)
        sliced.switch(selection)
        assert np.abs(logits(plain, PROMPT) - logits(sliced, PROMPT)).max() < 5e-2


def test_several_shards_are_numbered(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifprune_convert.weight_files.SHARD_BYTES", 10_000)
    selection, calls = selection_of(packed), []
    exported(packed, selection, tmp_path / "out", report=lambda done, total: calls.append((done, total)))
    names = sorted(file.name for file in (tmp_path / "out").glob("model-*"))
    assert len(names) > 2
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in arrays(tmp_path / "out", file) for name, file in index.items())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (Checkpoint.open(packed).weight_bytes,) * 2


# What is refused, and what is left then.


def test_what_cannot_be_exported(tmp_path: Path, checkpoint: Path, packed: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SelectionError, match="made for another model"):
        exported(checkpoint, random_selection([128] * 3, [40] * 3, 1), out)
    with pytest.raises(SelectionError, match=r"keeps 40, 48 neurons.*mlx-lm's llama.*same number in every FFN"):
        exported(checkpoint, selection_of(checkpoint, (48, 40)), out)
    with pytest.raises(CheckpointError, match=r"are not quantized; leave out --requantize-down"):
        exported(checkpoint, selection_of(checkpoint), out, requantize_down=True)
    with pytest.raises(SelectionError, match=r"keeps 40 neurons.*groups of 32; leave out --requantize-down"):
        exported(packed, selection_of(packed), out, requantize_down=True)
    assert not list(tmp_path.iterdir())


def test_only_an_export_is_overwritten(tmp_path: Path, checkpoint: Path) -> None:
    selection, out = selection_of(checkpoint), tmp_path / "out"
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    source = write_source(tmp_path / "source")
    (tmp_path / "file").write_text("x")
    for other in (copy, source, tmp_path / "file"):
        with pytest.raises(IfpruneError, match="was not written by `ifprune export`"):
            exported(copy, selection, other, overwrite=True)
    assert Checkpoint.open(copy).verify() == []
    exported(copy, selection, out)
    with pytest.raises(IfpruneError, match="already exists"):
        exported(copy, selection, out)
    exported(copy, selection_of(checkpoint, 64), out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 64
    (tmp_path / "empty").mkdir()
    exported(copy, selection, tmp_path / "empty", overwrite=True)
    assert not leftovers(out)


def test_a_checkpoint_that_lacks_a_tensor(tmp_path: Path, checkpoint: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    tensors = arrays(copy)
    mx.eval(tensors)
    del tensors["model.norm.weight"]
    mx.save_safetensors(str(copy / "model-00001-of-00001.safetensors"), tensors)
    write_manifest(copy, source="test", licence=None)
    with pytest.raises(
        CheckpointError, match=r"cannot load what it holds .*model.norm.weight.*convert the source again"
    ):
        exported(copy, selection_of(checkpoint), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_failed_overwrite_keeps_what_was_there(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    exported(checkpoint, selection_of(checkpoint), out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_config", fail)
    with pytest.raises(IfpruneError, match=r"No space left on device.*nothing was changed"):
        exported(checkpoint, selection_of(checkpoint, 64), out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not leftovers(out)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export_leaves_nothing_that_loads(tmp_path: Path, checkpoint: Path, how: signal.Signals) -> None:
    file, out = tmp_path / "s.safetensors", tmp_path / "there" / "out"
    selection_of(checkpoint).save(file)
    slow = (
        "import time; from ifprune_convert import weight_files as files; "
        "add = files.Shards.add; files.SHARD_BYTES = 1; "
        "files.Shards.add = lambda *given: (time.sleep(0.5), add(*given))[1]"
    )
    arguments = ["export", "--model", checkpoint, "--selection", file, "--mlx-path", out]
    with start(arguments, tmp_path, prelude=slow) as process:
        deadline = time.monotonic() + 60
        while not list(out.parent.glob(".out.partial-*/shard-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate()
    assert not out.exists()
    stale = leftovers(out)
    assert len(stale) == (how == signal.SIGKILL)
    for name in stale:
        with pytest.raises(FileNotFoundError):
            load_model(out.parent / name)
    assert run(*arguments, cache=tmp_path).returncode == 0
    assert not leftovers(out)
    load_model(out)


@pytest.mark.parametrize("model_type", ["glm4_moe", "phi3", "gemma4", "qwen3_5"])
def test_families_of_several_widths_and_nested_configs(tmp_path: Path, model_type: str) -> None:
    write_family(tmp_path / "source", model_type)
    made = run_convert(open_source(tmp_path / "source"), tmp_path / "ifp", Options()).checkpoint
    # The experts of a mixture are as wide as its shared expert: no config can say that only the latter is narrower.
    share = 1 if model_type == "glm4_moe" else 2
    ids = tuple(np.arange(spec.d_ffn // share, dtype=np.int32) for spec in made.layout.ffns)
    selection = Selection(ids, tuple(spec.d_ffn for spec in made.layout.ffns), "random")
    export_selection(made, selection, tmp_path / "export", dtype=mx.float16)
    exported, _ = load_model(tmp_path / "export")
    model = load_checkpoint(made, dtype=mx.float16)
    model.switch(selection)
    if model_type != "glm4_moe":  # MLX's CPU build runs routed experts in float32 only
        tokens = mx.array([[1, 40, 300, 7, 99]])
        difference = mx.abs(exported(tokens).astype(mx.float32) - model(tokens).astype(mx.float32)).max()
        assert float(difference) < 0.05
    # What mlx-lm says must not be cast, such as the bias that routes tokens, stays float32 in both.
    both = (tree_flatten(found.parameters()) for found in (exported, model.module))
    kept, ours = ({name for name, array in arrays if array.dtype == mx.float32} for arrays in both)
    assert kept == ours
    assert bool(kept) == (model_type in ("glm4_moe", "qwen3_5"))
