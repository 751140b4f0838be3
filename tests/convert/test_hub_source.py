"""Models of the hub as sources: the real client against a hub on this machine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_convert.readers.hub import locate_source
from ifprune_mlx import Checkpoint, load
from ifprune_mlx.errors import SourceError
from tests.cli.process import run, start
from tests.hub_stub import COMMIT, HubStub, command_lines, serve
from tests.tiny import write_source
from tests.tiny_gguf import CONFIG, make_model, write_gguf

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
# The client takes pieces of 10 MB: what is cut off in the middle must be larger.
CUT = 15_000_000
GPT2 = {
    "model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
NEVER = {
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "original/model.safetensors": b"copy",
    "original/consolidated.00.pth": b"pickle",
    "consolidated.safetensors": b"copy",
    "onnx/model.onnx": b"copy",
    "modeling_tiny.py": b"raise SystemExit",
    "logo.png": b"picture",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in two shards; the second, with the embeddings of a large vocabulary, has 25.6 MB."""
    folder = write_source(tmp_path_factory.mktemp("hub") / "tiny", vocab_size=100_000)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    placed = {name: SHARDS["embed" in name] for name in weights}
    for shard in SHARDS:
        mx.save_safetensors(str(folder / shard), {name: weights[name] for name in weights if placed[name] == shard})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "model.safetensors").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[HubStub]:
    with serve() as stub:
        stub.add("org/tiny", source)
        stub.repositories["org/tiny"] |= NEVER
        yield stub


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same files, but for what describes where they come from."""
    hashes = [Checkpoint.open(path).manifest["files"] for path in (one, other)]
    return bool(hashes[0] == hashes[1])


def test_a_model_of_the_hub(hub: HubStub, source: Path, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "hf")
    out = tmp_path / "out"
    line = ["convert", "--model", "org/tiny", "--overwrite", "--mlx-path", str(out)]
    # By its branch, and again by the commit: no file comes twice.
    done = command_lines(hub, tmp_path / "hf", [line, [*line, "--revision", COMMIT]])
    assert [code for code, _ in done] == [0, 0], done
    convert(open_source(source), tmp_path / "local", Options())
    assert same(out, tmp_path / "local")
    assert Checkpoint.open(out).manifest["licence"] == "apache-2.0"
    model, _ = load(out)
    model.close()
    assert not {one.file for one in hub.asked} & set(NEVER)
    assert sorted(hub.fetched()) == sorted(
        str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()
    )

    # Without the hub.
    for change in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        offline = run(*line, cache=tmp_path, env=env | change)
        assert offline.returncode == 0, offline.stderr
    assert same(out, tmp_path / "local")


def test_a_connection_that_breaks_goes_on_where_it_broke(hub: HubStub, source: Path, tmp_path: Path) -> None:
    hub.cut[SHARDS[1]] = CUT
    line = ["convert", "--model", "org/tiny", "--mlx-path", str(tmp_path / "out")]
    ((code, text),) = command_lines(hub, tmp_path / "hf", [line])
    if code:  # older clients do not try again by themselves
        assert "the connection to the hub failed" in text
        ((code, text),) = command_lines(hub, tmp_path / "hf", [line])
    assert code == 0, text
    ranges = [one.range for one in hub.asked if one.method == "GET" and one.file == SHARDS[1]]
    assert ranges[0] is None
    assert [int(str(value).removeprefix("bytes=").rstrip("-")) > 0 for value in ranges[1:]] == [True]
    convert(open_source(source), tmp_path / "local", Options())
    assert same(tmp_path / "out", tmp_path / "local")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_was_killed_keeps_whole_files(
    hub: HubStub, source: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    hub.stall[SHARDS[1]] = CUT
    line = ("convert", "--model", "org/tiny", "--mlx-path", str(tmp_path / "out"))
    with start(line, tmp_path, env=hub.env(tmp_path / "hf"), prelude="pass") as process:
        assert hub.stalled.wait(60)
        process.send_signal(ending)
        _, err = process.communicate(timeout=20)  # Ctrl-C does not wait for the file
    if ending is signal.SIGINT:
        assert process.returncode == 130
        assert err.decode().strip().endswith("interrupted")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial-*"))
    hub.stall.clear()
    hub.asked.clear()
    ((code, text),) = command_lines(hub, tmp_path / "hf", [line])
    assert code == 0, text
    assert hub.fetched() == [SHARDS[1]]
    convert(open_source(source), tmp_path / "local", Options())
    assert same(tmp_path / "out", tmp_path / "local")


def test_what_cannot_be_converted_costs_no_weights(hub: HubStub, source: Path, tmp_path: Path) -> None:
    tiny = {name: data for name, data in hub.repositories["org/tiny"].items() if name not in NEVER}
    config = json.loads(tiny["config.json"])
    without = {name: data for name, data in tiny.items() if not name.endswith((".safetensors", "index.json"))}

    def changed(**changes: object) -> dict[str, bytes]:
        return tiny | {"config.json": json.dumps(config | changes).encode()}

    ggufs = {f"tiny-Q{bits}_0.gguf": b"GGUF" for bits in (4, 8)}
    hub.repositories |= {
        "org/pickles": without | {"pytorch_model.bin": b"pickle"},
        "org/nothing": {"README.md": b"hello"},
        "org/ggufs": without | ggufs | {"parts/x-00001-of-00002.gguf": b"GGUF"},
        "org/adapter": {"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"},
        "org/mute": {name: data for name, data in tiny.items() if not name.startswith("tokenizer")},
        "org/odd": changed(model_type="gpt9"),
        "org/code": changed(model_file="odd.py"),
        "org/ungated": tiny | {"config.json": json.dumps(GPT2).encode()},
        "org/ifp": {"manifest.json": b"{}", "neurons-00001-of-00001.safetensors": b"", "config.json": b"{}"},
        "org/short": {name: data for name, data in tiny.items() if name != SHARDS[0]},
        "org/gated": tiny,
        "org/huge": tiny,
        "org/wide": tiny,
    }
    hub.gated.add("org/gated")
    hub.sizes["org/huge", SHARDS[1]] = 10**18
    hub.parameters["org/wide"] = 10**18
    cases = {
        "org/missing": "no such repository on the hub",
        "private/model": "log in with `hf auth login`",
        "org/tiny --revision v9": "has no revision 'v9'",
        "org/gated": "its owner has to grant access; ask for it at",
        "org/huge": "free, and 1000000.0 TB to download",
        "org/wide --dtype float16": "and 2000000.0 TB to write",
        "org/wide -q": "and 562500.0 TB to write",
        "org/pickles": "as Python pickles only",
        "org/nothing": "no *.safetensors at its top",
        "org/ggufs": "name one, as in --model org/ggufs:tiny-Q4_0.gguf; it has tiny-Q4_0.gguf, tiny-Q8_0.gguf",
        "org/ggufs:other.gguf": "has no file other.gguf; name one",
        "org/tiny/other.gguf": "has no GGUF files",
        "org/ggufs:parts/x-00001-of-00002.gguf": "is one of several parts",
        "org/adapter": "has *.safetensors but no config.json",
        "org/mute": "has no tokenizer",
        "org/odd": "has no model_type 'gpt9'",
        "org/code": "such code is never run",
        "org/ungated": "FFN",
        "org/ifp": "is an IFP checkpoint already",
        "org/short": f"lacks {SHARDS[0]}, which its index names",
        "org/a--b": "no name that the hub allows",
    }
    lines = [["convert", "--mlx-path", str(tmp_path / "out"), "--model", *case.split()] for case in cases]
    answers = command_lines(hub, tmp_path / "hf", lines)
    for (case, words), (code, text) in zip(cases.items(), answers, strict=True):
        name = case.split()[0].split(":")[0].removesuffix("/other.gguf")
        assert code == 1, case
        assert text.count("\n") == 1, text
        assert text.startswith(f"ifprune: error: {name}: "), text
        assert words in text, text
    assert not [file for file in hub.fetched() if file.endswith((".safetensors", ".bin", ".gguf"))]
    assert not (tmp_path / "out").exists()


def test_without_the_hub(tmp_path: Path) -> None:
    with serve() as stub:
        env = stub.env(tmp_path / "hf")
    for change, words in (
        ({}, "the connection to the hub failed"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
    ):
        done = run("convert", "--model", "org/tiny", cache=tmp_path, env=env | change)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("ifprune: error: org/tiny: ")
        assert words in done.stderr


def test_one_gguf_of_a_repository(hub: HubStub, tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "llama"}
    file = write_gguf(tmp_path / "tiny.gguf", config, make_model(config))
    hub.repositories["org/ggufs"] = {"q/tiny.gguf": file.read_bytes(), "q/other.gguf": b"GGUF", "README.md": b"hello"}
    convert(open_source(file), tmp_path / "local", Options())
    outs = [tmp_path / "colon", tmp_path / "slash"]
    lines = [
        ["convert", "--model", f"org/ggufs{sign}q/tiny.gguf", "--mlx-path", out]
        for sign, out in zip(":/", outs, strict=True)
    ]
    assert [code for code, _ in command_lines(hub, tmp_path / "hf", lines)] == [0, 0]
    assert hub.fetched() == ["q/tiny.gguf"]
    assert all(same(out, tmp_path / "local") for out in outs)


def test_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for text in ("org/name", "./org/other", "/org/other", "../other", "other", "org/name/deeper", "org/name/x.bin"):
        assert locate_source(text, out=tmp_path) == Path(text)
    with pytest.raises(SourceError, match="--revision is for a model of the hub"):
        locate_source("org/name", "main", out=tmp_path)
