"""What is done with a damaged input: the real commands, and the library where no command reads such a file.

A target gets the case's folder and a number that chooses between the ways to use the input. It raises what the product
raises; `check` says whether that, and what it left behind, is as it should be.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from ifprune_mlx import IfpruneError, load
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.data.tokenize import encode_all
from ifprune_mlx.eval.analysis import Quality
from ifprune_mlx.eval.exact_match import read_exact
from ifprune_mlx.eval.multiple_choice import read_choices
from ifprune_mlx.prompt_cache import History
from ifprune_mlx.train.config import TrainConfig
from tests.cli.process import run_here
from tests.ifprune_mlx.serving.http.serving import serving

MODEL = "model"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LONGEST = 1000


class Finding(Exception):
    """Something that must not happen, happened."""


class Bench:
    """The sound corpus beside the case, and what is loaded once for many cases."""

    def __init__(self, corpus: Path, scratch: Path) -> None:
        self.source = corpus / "source" / MODEL
        self.checkpoint = corpus / "checkpoint" / MODEL
        self._scratch = scratch
        self._open = ExitStack()
        self._loaded: tuple[Any, Any] | None = None
        self._server: Any = None

    @property
    def loaded(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = load(self.checkpoint)
        return self._loaded

    @property
    def server(self) -> Any:
        if self._server is None:
            self._server = self._open.enter_context(serving(self.checkpoint, self._scratch / "server"))
        return self._server

    def close(self) -> None:
        """End the server, which must end well."""
        self._open.close()

    def command(self, folder: Path, *arguments: str | Path, stdin: bytes = b"") -> int:
        """Run the command line here and check all that can be seen of it; returns its exit code."""
        env = {"IFPRUNE_CACHE": str(self._scratch), "IFPRUNE_DATA": str(folder / "data")}
        before = contents(folder)
        done = run_here(*arguments, stdin=stdin, env=env)
        check(done, before, contents(folder))
        return done.returncode


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, hidden ones too, with a hash of what ordinary files of some size hold."""
    found = {}
    for entry in sorted(folder.rglob("*")):
        plain = entry.is_file() and not entry.is_symlink() and entry.stat().st_size < 1 << 26
        found[str(entry.relative_to(folder))] = sha256(entry.read_bytes()).hexdigest() if plain else "special"
    return found


def check(done: subprocess.CompletedProcess[str], before: dict[str, str], after: dict[str, str]) -> None:
    """Raise Finding unless a command ended as commands do."""
    shown = f"{done.args}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if done.returncode not in (0, 1, 2):
        raise Finding(f"another exit code: {shown}")
    if "Traceback" in done.stderr:
        raise Finding(f"a traceback: {shown}")
    answers = done.args[0] in ("chat", "generate")  # a pipe gets an answer as it is
    if _CONTROLS.search(done.stderr) or (_CONTROLS.search(done.stdout) and not answers):
        raise Finding(f"control characters: {shown!r}")
    lines = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    errors = [line for line in lines if not line.startswith("ifprune: warning: ")]
    if bool(errors) != bool(done.returncode):
        raise Finding(f"no error line, or one without a failure: {shown}")
    if any(len(line) > _LONGEST for line in lines):
        raise Finding(f"a long error line: {shown}")
    new = after.keys() - before.keys()
    if hidden := [name for name in new if "/." in f"/{name}"]:
        raise Finding(f"left behind {hidden}: {shown}")
    if done.returncode and after != before and done.args[0] != "chat":  # which goes on after an error
        raise Finding(f"failed, and yet changed {new or 'files'}: {shown}")


def convert(bench: Bench, folder: Path, variant: int) -> None:
    model = folder / MODEL if (folder / MODEL).exists() else folder / "model.gguf"
    more: tuple[str, ...] = (("-q",), (), ("--dtype", "float16"), ())[variant % 4]
    if bench.command(folder, "convert", "--model", model, "--mlx-path", folder / "out", *more) == 0:
        answer(bench, folder, folder / "out", variant)


def answer(bench: Bench, folder: Path, model: Path, variant: int) -> None:
    ways: tuple[tuple[str, ...], ...] = (("--dense",), ("--selector", "activation"), (), ("--residency", "ssd"))
    bench.command(folder, "generate", "--model", model, "--prompt", "hello", "--max-tokens", "3", *ways[variant % 4])


def adapter(bench: Bench, folder: Path, variant: int) -> None:
    given = ("--model", bench.source, "--adapter", folder / "adapter", "--mlx-path", folder / "out")
    bench.command(folder, "convert", *given)


def predictor(bench: Bench, folder: Path, variant: int) -> None:
    given = ("--model", bench.source, "--predictor", folder / "predictor", "--mlx-path", folder / "out")
    if bench.command(folder, "convert", *given) == 0:
        answer(bench, folder, folder / "out", 2)


def prior(bench: Bench, folder: Path, variant: int) -> None:
    bench.command(
        folder,
        "convert",
        "--model",
        bench.source,
        "--prior",
        folder / "prior.safetensors",
        "--mlx-path",
        folder / "out",
    )


def checkpoint(bench: Bench, folder: Path, variant: int) -> None:
    model = folder / MODEL
    if variant % 3 and (model / "manifest.json").is_file():
        # Whoever damages a checkpoint on purpose makes the manifest agree.
        with suppress(OSError, ValueError):
            sizes = [file.stat().st_size for file in model.rglob("*") if file.is_file()]
            if sum(sizes) < 1 << 26:
                write_manifest(model, source="\x1b]0;title\x07", licence="\x9b31m")
    what = variant // 4 % 6
    if what == 0:
        bench.command(folder, "info", "--model", model)
    elif what == 1:
        bench.command(folder, "info", "--model", model, "--verify", "--json")
    elif what == 2:
        bench.command(folder, "select", "--model", model, "--prompt", "hello", "--layers")
    elif what == 3:
        bench.command(folder, "export", "--model", model, "--selector", "static", "--mlx-path", folder / "out")
    elif what == 4:
        bench.command(folder, "chat", "--model", model, stdin=b"hello\n/stats\n/task\n")
    else:
        answer(bench, folder, model, variant)


def selection(bench: Bench, folder: Path, variant: int) -> None:
    file = folder / "selection.safetensors"
    given = ("--model", bench.checkpoint, "--prompt", "hello")
    if variant % 3 == 0:
        bench.command(folder, "generate", *given, "--max-tokens", "2", "--selection", file)
    elif variant % 3 == 1:
        bench.command(folder, "select", *given, "--compare", file)
    else:
        bench.command(folder, "export", *given[:2], "--selection", file, "--mlx-path", folder / "out")


def task(bench: Bench, folder: Path, variant: int) -> None:
    if variant % 3 == 0:
        bench.command(folder, "tasks", "--model", bench.checkpoint)
    elif variant % 3 == 1:
        bench.command(folder, "select", "--model", bench.checkpoint, "--prompt", "hello")
    else:
        bench.command(folder, "chat", "--model", bench.checkpoint, "--task", "mine", stdin=b"hello\n")


def chat(bench: Bench, folder: Path, variant: int) -> None:
    file = folder / "chat.json"
    if variant % 2:
        bench.command(folder, "chat", "--model", bench.checkpoint, "-m", "3", "--load", file, stdin=b"hello\n/stats\n")
    else:
        lines = f"/load {file}\n/system\n/stats\nhello\n/save {file}\n"
        bench.command(folder, "chat", "--model", bench.checkpoint, "-m", "3", stdin=lines.encode())


def cache(bench: Bench, folder: Path, variant: int) -> None:
    model, _ = bench.loaded
    History.load(folder / "cache.safetensors", model).read(model, [5, 6])


def yaml(bench: Bench, folder: Path, variant: int) -> None:
    file = folder / "run.yaml"
    if variant % 2:
        TrainConfig.from_yaml(file, output=folder / "out", data={"a": folder / "none.jsonl"})
        return
    fixed = ("--model", bench.checkpoint, "--output", folder / "out", "--data", f"a={folder / 'none.jsonl'}")
    bench.command(folder, "train", "--config", file, *fixed)


def data(bench: Bench, folder: Path, variant: int) -> None:
    file = folder / ("data.jsonl" if variant % 2 else "data.jsonl.gz")
    what = variant // 2 % 5
    if what == 0:
        read_exact(file)
    elif what == 1:
        read_choices(file)
    elif what == 2:
        read_records(file, "a", strict=True)
    elif what == 3:
        records = read_records(file, "a", report=lambda line: None)[:20]
        encode_all(bench.loaded[1], [record for record in records if record.text is None], 64, lambda line: None)
    else:
        given = ("--data", f"a={file}", "--limit", "2", "--max-length", "32", "--selector", "activation")
        bench.command(folder, "doctor", "--model", bench.checkpoint, *given)


def evaluation(bench: Bench, folder: Path, variant: int) -> None:
    Quality.read(folder / "evaluation.json")


def body(bench: Bench, folder: Path, variant: int) -> None:
    paths = ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/completions")
    for path in paths[3:] if variant % 2 else paths[:3]:
        file = folder / ("text.json" if variant % 2 else "chat.json")
        if not file.is_file() or file.is_symlink() or file.stat().st_size > 1 << 26:
            return
        response = httpx.post(bench.server.url + path, content=file.read_bytes(), timeout=60)
        if response.status_code >= 500:
            raise Finding(f"{path}: status {response.status_code}: {response.text[:2000]}")
        if not response.headers["content-type"].startswith("text/event-stream"):
            json.loads(response.text)
    if any("Traceback" in line for line in bench.server.stderr):
        raise Finding(f"a traceback in the server: {''.join(bench.server.stderr)[-4000:]}")


def names(bench: Bench, folder: Path, variant: int) -> None:
    """Files whose names are odd, through every option that takes one; the case holds the name."""
    name = json.loads((folder / "name.json").read_text())["name"]
    if "\0" in name:  # no command line can hold it
        return
    path = str(folder / "at" / name)
    ways: list[tuple[str, ...]] = [
        ("info", "--model", path),
        ("convert", "--model", path, "--mlx-path", str(folder / "out")),
        ("convert", "--model", str(bench.source), "--mlx-path", path),
        ("generate", "--model", str(bench.checkpoint), "--prompt", "hi", "--selection", path),
        ("select", "--model", str(bench.checkpoint), "--prompt", name, "--save-to", f"{path}.safetensors"),
        ("select", "--model", str(bench.checkpoint), "--prompt", "hi", "--save", name),
        ("export", "--model", str(bench.checkpoint), "--selector", "static", "--mlx-path", path),
        ("chat", "--model", str(bench.checkpoint), "--load", path),
        ("chat", "--model", str(bench.checkpoint), "--system-prompt", name),
        ("train", "--config", path, "--output", str(folder / "out")),
        ("train", "--model", str(bench.checkpoint), "--data", f"{name}={path}", "--output", path),
        ("evaluate", "--model", str(bench.checkpoint), "--data", f"{name}={path}", "--json", path),
        ("generate", "--model", name, "--prompt", "hi"),
        ("tasks", "--model", str(bench.checkpoint), "--remove", name),
        (name,),
        ("info", f"--{name}"),
    ]
    bench.command(folder, *ways[variant % len(ways)], stdin=b"hello\n")


Target = Callable[[Bench, Path, int], None]
TARGETS: dict[str, tuple[str, Target]] = {
    "source": ("source", convert),
    "gguf": ("gguf", convert),
    "adapter": ("adapter", adapter),
    "predictor": ("predictor", predictor),
    "prior": ("prior", prior),
    "checkpoint": ("checkpoint", checkpoint),
    "selection": ("selection", selection),
    "task": ("task", task),
    "chat": ("chat", chat),
    "cache": ("cache", cache),
    "yaml": ("yaml", yaml),
    "data": ("data", data),
    "evaluation": ("evaluation", evaluation),
    "body": ("body", body),
    "names": ("names", names),
}
"""By name: the folder of the corpus that is damaged, and what is done with it."""


def run_target(bench: Bench, name: str, folder: Path, variant: int) -> None:
    """Do it; the product's own errors are as they should be."""
    with suppress(IfpruneError):
        TARGETS[name][1](bench, folder, variant)
