"""The converter: what it writes is what it read, and a conversion that fails or dies leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model

from ifprune_convert import layout
from ifprune_convert.calibrate import measure_prior
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, IfpruneError, load
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.errors import PredictorError, SourceError
from tests.cli.process import full_disk, run, slow_conversion, start
from tests.tiny import CONFIGS, write_source
from tests.tiny_gguf import CONFIG as GGUF_CONFIG
from tests.tiny_gguf import Kind, make_model, write_gguf
from tests.tiny_predictor import write_predictor

CHATS = [
    Record(({"role": "user", "content": "Say something."}, {"role": "assistant", "content": "Something else."})),
    Record(({"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2, 3, 4 and 5."})),
]


def arrays(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def converted(source: Path, out: Path, **options: Any) -> Checkpoint:
    return convert(open_source(source), out, Options(**options)).checkpoint


def leftovers(out: Path) -> list[str]:
    """What lies beside `out` under a hidden name."""
    return [entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny llama. Do not change it."""
    return write_source(tmp_path_factory.mktemp("dense") / "source")


# What is written.


@pytest.mark.parametrize("family", ["llama-bias", "llama-untied", "qwen3", "gemma2"])
def test_every_weight_comes_through_bit_for_bit(tmp_path: Path, family: str) -> None:
    dense = write_source(tmp_path / "dense", family)
    checkpoint = converted(dense, tmp_path / "out")
    weights = arrays(dense / "model.safetensors")
    parameters = sum(weight.size for weight in weights.values())
    for index, spec in enumerate(checkpoint.layout.ffns):
        neurons = arrays(checkpoint.neurons_file(index))
        gate, up, down = (weights.pop(f"{spec.path}.{leaf}.weight") for leaf in (spec.gate, spec.up, spec.down))
        assert mx.array_equal(neurons.pop("gate_up.weight"), mx.stack([gate, up], axis=1))
        assert mx.array_equal(neurons.pop("down.weight"), down.T)
        if family == "llama-bias":
            gate, up, down = (weights.pop(f"{spec.path}.{leaf}.bias") for leaf in (spec.gate, spec.up, spec.down))
            assert mx.array_equal(neurons.pop("gate_up.bias"), mx.stack([gate, up], axis=1))
            assert mx.array_equal(neurons.pop("down.bias"), down)
        assert not neurons
    rest: dict[str, mx.array] = {}
    for file in checkpoint.path.glob("model-*.safetensors"):
        rest |= arrays(file)
    assert rest.keys() == weights.keys()
    assert all(mx.array_equal(rest[name], weight) for name, weight in weights.items())
    assert checkpoint.parameters == parameters


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("affine", 32, 4), ("mxfp8", 32, 8)])
def test_quantized_layers_are_those_of_mlx_lm(
    tmp_path: Path, source: Path, mode: str, group_size: int, bits: int
) -> None:
    checkpoint = converted(source, tmp_path / "out", quantization=Quantization(group_size, bits, mode))
    dense, _ = load_model(source)
    nn.quantize(dense, group_size=group_size, bits=bits, mode=mode)
    expected = dict(tree_flatten(dense.parameters()))
    rest = arrays(checkpoint.path / "model-00001-of-00001.safetensors")
    assert rest.keys() == {name for name in expected if ".mlp." not in name}
    assert all(mx.array_equal(rest[name], expected[name]) for name in rest)
    for index, spec in enumerate(checkpoint.layout.ffns):
        neurons = arrays(checkpoint.neurons_file(index))
        for leaf in ("weight", "scales") + (("biases",) if mode == "affine" else ()):
            both = [expected[f"{spec.path}.{name}.{leaf}"] for name in (spec.gate, spec.up)]
            assert mx.array_equal(neurons[f"gate_up.{leaf}"], mx.stack(both, axis=1))
        # down is packed along the other axis than mlx-lm does: each neuron's row on its own.
        down = arrays(source / "model.safetensors")[f"{spec.path}.{spec.down}.weight"]
        packed = mx.quantize(down.T, group_size=group_size, bits=bits, mode=mode)
        for leaf, array in zip(("weight", "scales", "biases"), packed, strict=False):
            assert mx.array_equal(neurons[f"down.{leaf}"], array)
    assert checkpoint.config["quantization"] == {"group_size": group_size, "bits": bits, "mode": mode}
    assert checkpoint.parameters == converted(source, tmp_path / "plain").parameters


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dtype_casts_every_float(tmp_path: Path, source: Path, dtype: mx.Dtype) -> None:
    checkpoint = converted(source, tmp_path / "out", dtype=dtype)
    weights = arrays(source / "model.safetensors")
    neurons = arrays(checkpoint.neurons_file(1))
    rest = arrays(checkpoint.path / "model-00001-of-00001.safetensors")
    assert {array.dtype for array in (*neurons.values(), *rest.values())} == {dtype}
    down = weights["model.layers.1.mlp.down_proj.weight"].astype(dtype)
    assert mx.array_equal(neurons["down.weight"], down.T)
    assert mx.array_equal(rest["model.norm.weight"], weights["model.norm.weight"].astype(dtype))


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        (Kind.Q8_0, None, mx.float16),
        (Kind.BF16, None, mx.bfloat16),
        (Kind.Q8_0, mx.float32, mx.float32),
    ],
)
def test_a_gguf_file_converts(tmp_path: Path, kind: Kind, dtype: mx.Dtype | None, expected: mx.Dtype) -> None:
    config = {**GGUF_CONFIG, "model_type": "llama"}
    file = write_gguf(tmp_path / "model.gguf", config, make_model(config), kind=kind)
    checkpoint = converted(file, tmp_path / "out", dtype=dtype)
    down = open_source(file).take("model.layers.1.mlp.down_proj.weight")
    neurons = arrays(checkpoint.neurons_file(1))
    assert neurons["down.weight"].dtype == expected
    assert mx.array_equal(neurons["down.weight"], down.T.astype(expected))
    assert (checkpoint.manifest["source"], checkpoint.manifest["licence"]) == ("model.gguf", "apache-2.0")
    model, tokenizer = load(checkpoint.path)
    assert tokenizer.decode(tokenizer.encode("the 123")) == "the 123"
    model.close()


def test_several_shards_are_numbered(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifprune_convert.weight_files.SHARD_BYTES", 30_000)
    checkpoint = converted(source, tmp_path / "out")
    names = sorted(file.name for file in checkpoint.path.glob("model-*"))
    assert len(names) > 1
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert not list(checkpoint.path.glob("shard-*"))
    model, _ = load(checkpoint.path)
    expected, _ = load_model(source)
    tokens = mx.array([[5, 9, 77]])
    assert mx.abs(model(tokens) - expected(tokens)).max() < 1e-5
    model.close()


def test_prior_of_the_weights(tmp_path: Path, source: Path) -> None:
    checkpoint = converted(source, tmp_path / "out")
    weights = {name: np.array(array) for name, array in arrays(source / "model.safetensors").items()}
    stored = arrays(checkpoint.priors_file)
    assert checkpoint.prior_method == "weights"
    for index in range(2):
        gate, up, down = (weights[f"model.layers.{index}.mlp.{leaf}_proj.weight"] for leaf in ("gate", "up", "down"))
        norms = np.linalg.norm(down, axis=0)
        prior = np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1) * norms
        assert np.allclose(np.array(stored[f"down_norm.{index}"]), norms, rtol=1e-5)
        assert np.allclose(np.array(stored[f"prior.{index}"]), prior, rtol=1e-5)


def test_calibrated_prior(tmp_path: Path, source: Path) -> None:
    """Against a recomputation with mlx-lm's own model, its hidden units caught before `down_proj`."""
    checkpoint = converted(source, tmp_path / "out", calibration=CHATS)
    assert checkpoint.prior_method == "calibrated"
    dense, _ = load_model(source)
    tokenizer = load_tokenizer(source)
    hidden: list[list[np.ndarray[Any, Any]]] = [[], []]
    for layer, seen in zip(dense.layers, hidden, strict=True):
        leaf = layer.mlp.down_proj
        layer.mlp.down_proj = lambda x, seen=seen, leaf=leaf: (seen.append(np.array(x[0])), leaf(x))[1]
    totals, count = [np.zeros(128), np.zeros(128)], 0
    for chat in CHATS:
        prompt = tokenizer.apply_chat_template([chat.messages[0]], add_generation_prompt=True)
        answer = tokenizer.encode(chat.messages[1]["content"], add_special_tokens=False)
        dense(mx.array([prompt + answer]))
        for index, seen in enumerate(hidden):
            squares = seen.pop()[len(prompt) :].astype(np.float64) ** 2
            totals[index] += np.sum(squares / squares.sum(axis=1, keepdims=True), axis=0)
        count += len(answer)
    stored = arrays(checkpoint.priors_file)
    for index, total in enumerate(totals):
        expected = np.sqrt(total / count) * np.array(stored[f"down_norm.{index}"])
        assert np.allclose(np.array(stored[f"prior.{index}"]), expected, rtol=1e-4)
    # Everything else is as without calibration.
    plain = converted(source, tmp_path / "plain").manifest["files"]
    changed = {name for name, entry in checkpoint.manifest["files"].items() if entry != plain[name]}
    assert changed == {"priors.safetensors"}


def test_a_chat_without_an_answer_within_reach_is_refused(tmp_path: Path, source: Path) -> None:
    long = Record(({"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y"}))
    with pytest.raises(SourceError, match="no calibration chat has an answer"):
        converted(source, tmp_path / "out", calibration=[long])
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path / "out")


def test_a_ready_prior_is_taken_over(tmp_path: Path, source: Path) -> None:
    prior = [np.arange(128, dtype=np.float32) + index for index in range(2)]
    checkpoint = converted(source, tmp_path / "out", prior=prior)
    assert checkpoint.prior_method == "calibrated"
    assert np.array_equal(np.array(arrays(checkpoint.priors_file)["prior.1"]), prior[1])
    with pytest.raises(SourceError, match="model of another shape"):
        converted(source, tmp_path / "other", prior=prior[:1])


def test_the_manifest_lists_every_file(tmp_path: Path, source: Path) -> None:
    predictor = write_predictor(tmp_path / "predictor")
    checkpoint = converted(source, tmp_path / "out", predictor=predictor)
    files = {str(f.relative_to(checkpoint.path)) for f in checkpoint.path.rglob("*") if f.is_file()}
    # The card may be edited, on the hub too, without looking like damage.
    assert set(checkpoint.manifest["files"]) == files - {"manifest.json", "README.md"}
    assert checkpoint.verify() == []
    assert {"tokenizer.json", "tokenizer_config.json", "predictor/head.safetensors", "predictor/config.json"} <= files
    assert re.fullmatch(r"[0-9a-f]{16}", checkpoint.id)


def test_tokenizer_files_are_the_sources(tmp_path: Path, source: Path) -> None:
    checkpoint = converted(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (checkpoint.path / name).read_bytes() == (source / name).read_bytes()
    assert load_tokenizer(checkpoint.path).eos_token == "<|im_end|>"


def test_the_predictor_is_copied_and_becomes_the_default(tmp_path: Path, source: Path) -> None:
    predictor = write_predictor(tmp_path / "predictor")
    (predictor / "notes.py").write_text("raise SystemExit")
    checkpoint = converted(source, tmp_path / "out", predictor=predictor)
    assert checkpoint.has_predictor
    assert checkpoint.layout.selector == "learned"
    copied = {file.name: file.read_bytes() for file in (checkpoint.path / "predictor").iterdir()}
    assert copied == {file.name: file.read_bytes() for file in predictor.iterdir() if file.name != "notes.py"}
    model, _ = load(checkpoint.path)
    assert model.predictor is not None
    assert [len(scores) for scores in model.predictor.scores("hello")] == [128, 128]
    model.close()


def test_a_predictor_of_another_model_is_refused_before_any_work(tmp_path: Path, source: Path) -> None:
    predictor = write_predictor(tmp_path / "predictor", (128, 128, 128))
    with pytest.raises(PredictorError, match=r"3 FFNs .* trained for another model"):
        converted(source, tmp_path / "out", predictor=predictor)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["predictor"]


@pytest.mark.parametrize("quantization", [None, Quantization(64, 4, "affine")])
def test_two_conversions_of_one_source_are_the_same(
    tmp_path: Path, source: Path, quantization: Quantization | None
) -> None:
    one, two = (converted(source, tmp_path / name, quantization=quantization) for name in ("one", "two"))
    assert one.id == two.id
    assert one.id != converted(write_source(tmp_path / "s", seed=1), tmp_path / "three").id


def test_every_byte_of_a_checkpoint_is_hashed_once(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where files are written anew: with a predictor, a measured prior and another order of neurons."""
    counted = 0

    def sha256() -> Any:
        digest = hashlib.sha256()

        def update(block: bytes) -> None:
            nonlocal counted
            counted += len(block)
            digest.update(block)

        return SimpleNamespace(update=update, hexdigest=digest.hexdigest)

    monkeypatch.setattr("ifprune_mlx.checkpoint.atomic_write.hashlib", SimpleNamespace(sha256=sha256))
    predictor = write_predictor(tmp_path / "predictor")
    made = converted(source, tmp_path / "out", predictor=predictor, calibration=CHATS, order=CHATS)
    assert made.layout.order == "frequency"
    assert counted == made.disk_bytes
    assert made.verify() == []


def test_progress_counts_every_parameter_once(tmp_path: Path, source: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    options = Options(calibration=CHATS)
    done = convert(open_source(source), tmp_path / "out", options, lambda *call: calls.append(call))
    totals = {stage: {total for name, _, total in calls if name == stage} for stage in ("convert", "calibrate")}
    assert totals["convert"] == {done.checkpoint.parameters}
    for stage, (total,) in totals.items():
        counts = [count for name, count, _ in calls if name == stage]
        assert counts == sorted(counts)
        assert counts[-1] == total


# What is left of a conversion that fails.


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = converted(source, tmp_path / "out").manifest
    dense = write_source(tmp_path / "other", seed=1)
    packed = layout.packed

    def fail(name: str, *given: Any) -> dict[str, mx.array]:
        if name == "down":
            raise OSError(28, "No space left on device")
        return packed(name, *given)

    monkeypatch.setattr(layout, "packed", fail)
    with pytest.raises(SourceError, match=r"No space left on device.*nothing was changed"):
        converted(dense, tmp_path / "out", overwrite=True)
    assert Checkpoint.open(tmp_path / "out").manifest == before
    assert not leftovers(tmp_path / "out")
    monkeypatch.undo()
    assert converted(dense, tmp_path / "out", overwrite=True).manifest["files"] != before["files"]
    assert not leftovers(tmp_path / "out")


def test_only_a_checkpoint_is_overwritten(tmp_path: Path, source: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for out in (work, tmp_path / "file", source):
        with pytest.raises(SourceError, match="is not an IFP checkpoint"):
            converted(source, out, overwrite=True)
    (work / "thesis.txt").unlink()
    assert converted(source, work, overwrite=True).path == work
    # Of a link to a checkpoint, only the link is replaced.
    converted(source, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    converted(source, tmp_path / "link", overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert Checkpoint.open(tmp_path / "real").verify() == []
    assert not leftovers(work)


def test_of_two_conversions_at_once_the_first_to_end_wins(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    first: list[Checkpoint] = []

    def meanwhile(*_: object) -> None:
        if not first:
            first.append(converted(source, out))

    with pytest.raises(SourceError, match="made by another process meanwhile"):
        convert(open_source(write_source(tmp_path / "other", seed=1)), out, Options(), meanwhile)
    assert Checkpoint.open(out).id == first[0].id
    assert not leftovers(out)
    # With leave to overwrite, the last to end does.
    first.clear()
    shutil.rmtree(out)
    last = convert(open_source(tmp_path / "other"), out, Options(overwrite=True), meanwhile).checkpoint
    assert Checkpoint.open(out).id == last.id != first[0].id
    assert not leftovers(out)


def test_two_processes_at_once(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    arguments = ["convert", "--model", source, "--mlx-path", out]
    both = [start(arguments, tmp_path, prelude=slow_conversion(0.05)) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    assert any("made by another process" in error or "already exists" in error for error in errors)
    assert Checkpoint.open(out).verify() == []
    assert not leftovers(out)


def caught_in_the_act(source: Path, out: Path) -> subprocess.Popen[bytes]:
    """A conversion that has written its first neurons file and is not done."""
    process = start(["convert", "--model", source, "--mlx-path", out], out.parent, prelude=slow_conversion(0.5))
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(f".{out.name}.partial-*/neurons-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    process = caught_in_the_act(source, out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    (stale,) = leftovers(out)
    with pytest.raises(IfpruneError, match="did not finish"):
        Checkpoint.open(tmp_path / stale)
    assert run("convert", "--model", source, "--mlx-path", out, cache=tmp_path).returncode == 0
    assert Checkpoint.open(out).verify() == []
    assert not leftovers(out)


def test_ctrl_c_leaves_nothing(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    process = caught_in_the_act(source, out)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.splitlines()[-1]) == (130, b"", b"interrupted")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, source: Path) -> None:
    """The disk fills up while the last file is written, after everything else went well."""
    before = converted(source, tmp_path / "out").manifest
    limit = (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_size - 1
    done = run(
        "convert", "--model", source, "--mlx-path", tmp_path / "out", "--overwrite",
        cache=tmp_path, prelude=full_disk(limit),
    )  # fmt: skip
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert Checkpoint.open(tmp_path / "out").manifest == before
    assert not leftovers(tmp_path / "out")


def test_calibration_of_an_open_model_leaves_it_dense(tmp_path: Path, source: Path) -> None:
    checkpoint = converted(source, tmp_path / "out")
    model, _ = load(checkpoint.path)
    seen: list[int] = []
    one = measure_prior(model, checkpoint.path, CHATS, lambda done, total: seen.append(done))
    two = measure_prior(model, checkpoint.path, CHATS[::-1], lambda done, total: None)
    assert model.selection is None
    assert len(seen) == len(CHATS)
    for a, b in zip(one, two, strict=True):
        assert np.allclose(a, b, rtol=1e-5)
    model.close()


def test_config_keeps_what_the_source_says(tmp_path: Path, source: Path) -> None:
    config = json.loads((converted(source, tmp_path / "out", density=0.27).path / "config.json").read_text())
    section = config.pop("ifpruning")
    assert config == CONFIGS["llama"]
    assert section["density"] == 0.27
    assert section["selector"] == "activation"
    assert len(section["ffns"]) == 2
