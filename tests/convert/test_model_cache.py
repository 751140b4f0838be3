"""Models that are no IFP checkpoints: a command converts them once, and finds them in the cache later."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from mlx_lm import convert as mlx_convert

from ifprune_convert import model_cache
from ifprune_convert.folder_lock import alone
from ifprune_convert.model_cache import cached_model, cached_models, choose_options, ensure_converted
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint
from ifprune_mlx.device import Device
from tests.cli.process import run_here, slow_conversion, start
from tests.hub_stub import serve
from tests.tiny import write_source
from tests.tiny_gguf import CONFIG, make_model, write_gguf

BRIEF = "from ifprune_convert import model_cache; model_cache._EVERY = 100"
ONCE = "converted into the cache, once"


@pytest.fixture(autouse=True)
def _few_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cache, "_EVERY", 100)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_source(tmp_path / "dense")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    config = {**CONFIG, "model_type": "llama"}
    return write_gguf(tmp_path / "tiny.gguf", config, make_model(config))


def cache() -> Path:
    return Path(os.environ["IFPRUNE_CACHE"])


def ask(model: str | Path, *more: str) -> tuple[int, str]:
    """Exit code and stderr of one answer."""
    done = run_here("generate", "--model", str(model), "--prompt", "hello", "--max-tokens", "2", *more)
    return done.returncode, done.stderr


def not_converted(model: Path) -> str | None:
    """What `info` says is the reason why it has nothing to show; it says what to do in the same line."""
    done = run_here("info", "--model", str(model))
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert f"`ifprune chat --model {model}` converts it at first use, `ifprune convert --model {model}`" in line
    return next((why for why in ("no IFP checkpoint yet", "has changed since its conversion") if why in line), None)


@pytest.mark.parametrize("kind", ["gguf", "dense", "mlx-lm 4 bits"])
def test_a_model_is_converted_at_its_first_use_only(kind: str, dense: Path, gguf: Path, tmp_path: Path) -> None:
    model = gguf if kind == "gguf" else dense
    if kind == "mlx-lm 4 bits":
        model = tmp_path / "packed"
        mlx_convert(str(dense), str(model), quantize=True, q_bits=4, q_group_size=64)
    code, told = ask(model, "--no-convert")
    assert code == 1
    assert "ifprune convert" in told
    assert not cache().joinpath("models").exists()

    assert not_converted(model) == "no IFP checkpoint yet"

    code, told = ask(model)
    assert code == 0, told
    assert told.count(ONCE) == 1
    assert "GB read" in told
    assert "In memory the weights take" in told
    (found,) = cached_models()
    assert (found.name, found.kind, found.usable) == (str(model), "converted", True)
    checkpoint = Checkpoint.open(next(found.folder.glob("*-f1r*")))
    assert checkpoint.prior_method == "calibrated"
    assert (checkpoint.layout.gate_up is not None) == (kind == "mlx-lm 4 bits")

    for more in ((), ("--no-convert",)):
        code, told = ask(model, *more)
        assert code == 0, told
        assert ONCE not in told
    shown = run_here("chat", "--model", str(model), "--max-tokens", "1", stdin=b"hello\n")
    assert shown.returncode == 0, shown.stderr
    assert ONCE not in shown.stderr
    # Other commands take what is there, until the source changes.
    assert run_here("info", "--model", str(model)).returncode == 0
    os.utime(next(model.glob("*.safetensors")) if model.is_dir() else model, ns=(1, 1))
    assert not_converted(model) == "has changed since its conversion"


def test_models_of_the_hub(dense: Path, gguf: Path, tmp_path: Path) -> None:
    lines = [
        ["generate", "--prompt", "hello", "--max-tokens", "1", "--model", model]
        for model in ("org/dense", "org/ggufs:tiny.gguf")
    ]
    code = (
        f"{BRIEF}; import json; from tests.cli.process import run_here; "
        f"print(json.dumps([(one.returncode, one.stderr) for one in (run_here(*line) for line in {lines!r})]))"
    )
    with serve() as hub:
        hub.add("org/dense", dense)
        hub.repositories["org/ggufs"] = {"tiny.gguf": gguf.read_bytes(), "README.md": b""}
        first = json.loads(hub.client(tmp_path, code))
        fetched = Counter(hub.fetched())
        shutil.rmtree(tmp_path / "hub")  # the conversion needs the download no more
        second = json.loads(hub.client(tmp_path, code))
    without = json.loads(hub.client(tmp_path, code))  # the hub is gone
    assert [status for status, _ in (*first, *second, *without)] == [0] * 6, (first, second, without)
    assert [text.count(ONCE) for _, text in (*first, *second, *without)] == [1, 1, 0, 0, 0, 0]
    assert set(fetched.values()) == {1}
    assert Counter(hub.fetched()) == fetched
    assert all("its conversion in the cache is used" in text for _, text in without)


def test_a_source_that_changed_is_converted_again_in_the_place_of_the_old_one(gguf: Path) -> None:
    first = ensure_converted(str(gguf))
    os.utime(gguf, ns=(1, 1))
    notes: list[str] = []
    second = ensure_converted(str(gguf), note=notes.append)
    assert second != first
    assert not first.exists()
    assert any("has changed since its conversion" in note for note in notes)
    gguf.unlink()  # what was made of it stays usable
    assert ensure_converted(str(gguf), note=notes.append) == second
    assert "its conversion in the cache is used" in notes[-1]


def test_the_conversion_of_another_version_is_made_again(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cache, "_VERSION", "f1r0")
    first = ensure_converted(str(gguf))
    monkeypatch.undo()
    monkeypatch.setenv("IFPRUNE_CACHE", str(first.parents[2]))
    monkeypatch.setattr(model_cache, "_EVERY", 100)
    assert [model.usable for model in cached_models()] == [False]
    notes: list[str] = []
    second = ensure_converted(str(gguf), note=notes.append)
    assert any("was converted by another version" in note for note in notes)
    assert [path.name for path in second.parent.iterdir() if path.is_dir()] == [second.name]


def test_a_damaged_conversion_is_made_again(gguf: Path) -> None:
    path = ensure_converted(str(gguf))
    (path / "priors.safetensors").unlink()
    assert ensure_converted(str(gguf)) == path
    Checkpoint.open(path)


def test_two_processes_convert_it_once(gguf: Path) -> None:
    line = ["generate", "--prompt", "hello", "--max-tokens", "1", "--model", str(gguf)]
    both = [start(line, cache(), prelude=f"{slow_conversion(0.1)}; {BRIEF}") for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    told = [err.decode() for _, err in ends]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(text.count(ONCE) for text in told) == [0, 1]
    assert sum("Another process converts" in text for text in told) <= 1


@pytest.mark.parametrize("wait", ["source.json", ".partial-"])
def test_kill_9_while_it_is_converted(gguf: Path, wait: str) -> None:
    line = ["generate", "--prompt", "hello", "--max-tokens", "1", "--model", str(gguf)]
    with start(line, cache(), prelude=f"{slow_conversion(0.2)}; {BRIEF}") as process:
        while not any(wait in path.name for path in cache().rglob("*")):
            time.sleep(0.01)
        process.kill()
    models = cached_models()
    assert [model.usable for model in models] == [False] * len(models)
    path = ensure_converted(str(gguf))
    assert sorted(one.name for one in path.parent.iterdir()) == sorted([path.name, "source.json"])


def stopped_at(stage: str, gguf: Path) -> list[str]:
    """Ctrl-C in this stage of a conversion; what was said."""
    notes: list[str] = []

    def report(now: str, done: int, total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_converted(str(gguf), report=report, note=notes.append)
    return notes


def test_ctrl_c_while_weights_are_converted_keeps_nothing(gguf: Path) -> None:
    assert stopped_at("convert", gguf)[-1] == f"{gguf}: its conversion was stopped; nothing of it was kept"
    assert cached_models() == []


@pytest.mark.parametrize("damaged", [False, True])
def test_ctrl_c_while_chats_are_read_keeps_the_converted_model(gguf: Path, damaged: bool) -> None:
    assert "the converted model is kept, and the next start goes on" in stopped_at("calibrate", gguf)[-1]
    (found,) = cached_models()
    assert not found.usable
    if damaged:
        next(found.folder.glob(".*.unfinished/config.json")).write_text("{")
    stages, notes = set[str](), list[str]()
    path = ensure_converted(str(gguf), report=lambda stage, done, total: stages.add(stage), note=notes.append)
    assert stages == ({"convert", "calibrate"} if damaged else {"calibrate"})
    assert notes[0] == f"{gguf}: its conversion goes on"
    assert sorted(one.name for one in path.parent.iterdir()) == sorted([path.name, "source.json"])
    # The same as without a stop.
    files = {name: entry["sha256"] for name, entry in Checkpoint.open(path).manifest["files"].items()}
    shutil.rmtree(path.parent)
    again = Checkpoint.open(ensure_converted(str(gguf)))
    assert {name: entry["sha256"] for name, entry in again.manifest["files"].items()} == files
    assert again.prior_method == "calibrated"


def test_models_lists_and_removes(gguf: Path, dense: Path) -> None:
    empty = run_here("models", "--json")
    assert json.loads(empty.stdout) == {"models": []}
    ensure_converted(str(gguf))
    ensure_converted(str(dense))
    rows = json.loads(run_here("models", "--json").stdout)["models"]
    assert [row["name"] for row in rows] == [str(dense), str(gguf)]
    assert all(row["bytes"] > 100_000 and row["usable"] for row in rows)
    shown = run_here("models").stdout.splitlines()
    assert [line.split()[0][-10:] for line in shown] == [str(dense)[-10:], str(gguf)[-10:], "total"]
    assert all(len(line) <= 80 for line in shown)
    assert len({line.find(" MB") for line in shown} | {line.index("converted") - 5 for line in shown[:2]}) == 1
    with alone(cached_model(str(gguf)).folder, lambda: None):
        busy = run_here("models", "--remove", "tiny.gguf")
    assert (busy.returncode, "is being converted by another process" in busy.stderr) == (1, True)
    removed = run_here("models", "--remove", "tiny.gguf")
    assert "removed" in removed.stderr
    assert "tiny.gguf" not in removed.stdout
    assert [model.name for model in cached_models()] == [str(dense)]
    missing = run_here("models", "--remove", "tiny.gguf")
    assert missing.returncode == 1
    assert "is not in the cache, which holds" in missing.stderr


def test_how_a_model_is_packed_for_the_machine(dense: Path, tmp_path: Path) -> None:
    source = open_source(dense)
    _, whole = choose_options(source, Device(1 << 40), cpu=True)
    roomy, _ = choose_options(source, Device(1 << 40), cpu=False)
    assert (roomy.quantization, roomy.calibration is not None) == (None, True)
    tight, size = choose_options(source, Device(whole // 2), cpu=False)
    assert tight.quantization is not None
    assert tight.quantization.bits == 4
    assert size <= whole // 2 * 9 // 10
    hopeless, size = choose_options(source, Device(1000), cpu=False)
    assert hopeless.calibration is None
    assert size > 1000
    # A file of eight bits a weight stays at about eight.
    config = {**CONFIG, "model_type": "llama", "intermediate_size": 2048}
    packed = write_gguf(tmp_path / "q8.gguf", config, make_model(config), kind=Kind.Q8_0)
    chosen, _ = choose_options(open_source(packed), Device(1 << 40), cpu=False)
    assert chosen.quantization is not None
    assert chosen.quantization.bits == 8


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(model_cache.shutil, "disk_usage", lambda path: usage)


def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cache, "this_device", lambda: Device(1000))


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (no_room, "free some space (`ifprune models` removes), or set IFPRUNE_CACHE"),
        (little_memory, "--residency ssd"),
    ],
)
def test_what_does_not_fit_is_refused_first(
    prepare: Callable[[pytest.MonkeyPatch], None], words: str, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch)
    code, told = ask(gguf)
    assert code == 1
    assert told.count("\n") == 1
    assert words in told
    assert not [file for file in cache().rglob("*") if file.is_file() and not file.name.endswith(".lock")]
