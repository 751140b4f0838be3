"""A worker: one model in a process of its own, timed on demand; and the client that talks to it.

A process of its own, so that what it keeps in memory can be told from what the others do. It answers one JSON request
after the other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from ifprune_mlx.bench.process_memory import most_resident, resident
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.device import limit_cache, wire
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.model import Model, load, own_dtype
from ifprune_mlx.parallel.ranks import join
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import Instruction, LearnedSelector, Selector, make_selector
from ifprune_mlx.sparse.down_product import choose

_BANDWIDTH_ELEMENTS = 1 << 26
_COLUMNS = 1 << 12


class WorkerClient:
    """This process's end of a worker.

    Attributes:
        load_s: seconds that loading its model took.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._name = name
        self.load_s = float(self._answer()["load_s"])

    def __call__(self, do: str, **arguments: Any) -> Any:
        """Have the worker call its method `do`, and wait for what that returns.

        Raises:
            IfpruneError: if it failed, or its process ended.
        """
        self._connection.send_bytes(json.dumps({"do": do, **arguments}).encode())
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as exc:
            raise IfpruneError(
                f"bench: the process of {self._name} ended before it answered (out of memory?); give fewer --layers"
            ) from exc
        if "error" in answer:
            raise IfpruneError(f"bench, {self._name}: {answer['error']}")
        return answer["ok"]


@contextmanager
def start_worker(folder: Path, residency: str | None, dtype: str | None, name: str) -> Iterator[WorkerClient]:
    """A worker, ended with the block. Arguments as for `serve`; `name` stands in error messages."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, str(folder), residency, dtype), daemon=True)
    process.start()
    theirs.close()
    try:
        yield WorkerClient(ours, name)
    except BaseException:
        process.kill()
        raise
    finally:
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def serve(connection: Connection, folder: str, residency: str | None, dtype: str | None) -> None:
    """Load a model and answer requests until the connection closes.

    Args:
        folder: an IFP checkpoint, or a plain mlx-lm model if `residency` is None.
        residency: as `ifprune_mlx.load` takes it.
        dtype: float type to cast to.
    """
    cast = None if dtype is None else getattr(mx, dtype)
    try:
        worker = Worker(Path(folder), residency, cast)
        connection.send_bytes(json.dumps({"ok": {"load_s": worker.load_s}}).encode())
        while True:
            request = json.loads(connection.recv_bytes())
            with _wired():
                answer = getattr(worker, request.pop("do"))(**request)
            connection.send_bytes(json.dumps({"ok": answer}).encode())
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    except IfpruneError as exc:
        connection.send_bytes(json.dumps({"error": str(exc)}).encode())
    except Exception as exc:  # MLX where memory ends, mlx-lm on what it cannot read: the other side has to say it
        connection.send_bytes(json.dumps({"error": f"{folder}: {exc}"}).encode())
    finally:
        os._exit(0)  # MLX's exit handlers may take a second per process


def _end(line: str) -> None:
    os._exit(1)  # the client says that its worker has ended


@contextmanager
def _wired() -> Iterator[None]:
    """Wire this process's memory as long as the block runs: of several workers, only the one that computes."""
    before = wire()
    mx.eval(mx.zeros(1))  # the GPU learns what is wired with the next work that it gets
    try:
        yield
    finally:
        mx.synchronize()
        mx.synchronize(generation_stream)
        if before is not None:
            mx.set_wired_limit(before)


class Worker:
    """A loaded model. Its public methods are the requests that a client can send."""

    def __init__(self, folder: Path, residency: str | None, dtype: mx.Dtype | None) -> None:
        start = time.perf_counter()
        self._model: Model | None = None
        self._selector: Selector | None = None
        self._dtype = dtype
        if residency is None:
            self._module, self.config = load_model(folder)
            if dtype is not None:
                self._module.set_dtype(dtype)
            mx.eval(self._module)
            limit_cache()  # as for ours
        else:
            checkpoint = Checkpoint.open(folder)
            dtype = dtype or own_dtype(checkpoint)
            self._model, _ = load(checkpoint, dtype=dtype, residency=residency, ranks=join(_end))
            self._module, self.config = self._model.module, self._model.config
        mx.set_wired_limit(0)  # several workers live at once, and only the one that works is wired: see `serve`
        self.load_s = time.perf_counter() - start

    def run(self, tokens: list[int], generate: int) -> dict[str, float]:
        """Read `tokens` and generate; seconds of both, and bytes of weights that moved while decoding."""
        cache = make_prompt_cache(self._module)
        moved = self._moved()
        start = first = time.perf_counter()
        steps = generate_step(mx.array(tokens), self._module, max_tokens=generate, prompt_cache=cache)
        for index, _ in enumerate(steps):
            if index == 0:
                first, moved = time.perf_counter(), self._moved()
        end = time.perf_counter()
        return {
            "prefill_s": first - start,
            "decode_s": (end - first) / max(generate - 1, 1),
            "moved_in_decode": self._moved() - moved,
        }

    def select(self, text: str, *, cached: bool) -> float:
        """Seconds to select by a text; `cached`: a text seen before is found in the cache of selections."""
        assert self._model is not None
        if self._selector is None:
            learned = self._model.checkpoint.has_predictor
            self._selector = make_selector(self._model, "learned" if learned else "random")
        chooser = self._selector
        if not cached and self._model.predictor is not None:
            chooser = LearnedSelector(self._model, self._model.predictor)
        instruction = Instruction(text, (1,))
        start = time.perf_counter()
        chooser.select(instruction, self._model.keep())
        return time.perf_counter() - start

    def switch(self, selection: str | None) -> dict[str, Any]:
        """Make the selection of a file active, or all neurons; waits until what it reads is there."""
        assert self._model is not None
        chosen = None if selection is None else Selection.load(selection)
        start = time.perf_counter()
        done = self._model.switch(chosen)
        planned = time.perf_counter() - start
        for slots in self._model.slots:
            if slots.pending is not None:
                slots.pending.result()
        row = [slots.row_bytes for slots in self._model.slots]
        neurons = sum(slots.k for slots in self._model.slots)
        return {
            "switch_s": planned,
            "rows_s": time.perf_counter() - start,
            "entered": done.neurons * row[0],
            "missing": done.missing * row[0],
            "written": done.bytes,
            "active": neurons * row[0],
        }

    def first(self, selection: str, tokens: list[int]) -> float:
        """Seconds from a selection to the first token; what has to be read is read while the first layers compute."""
        assert self._model is not None
        start = time.perf_counter()
        self._model.switch(Selection.load(selection))
        next(generate_step(mx.array(tokens), self._module, max_tokens=1, prompt_cache=make_prompt_cache(self._module)))
        return time.perf_counter() - start

    def memory(self) -> dict[str, int]:
        """Bytes: what the process has resident, its peak, and MLX's own figures."""
        mx.clear_cache()
        return {
            "rss": resident(),
            "peak_rss": most_resident(),
            "mlx": mx.get_active_memory(),
            "mlx_peak": mx.get_peak_memory(),
        }

    def down_kernels(self) -> dict[int, dict[str, str]]:
        """Which kernel computes the down products of 1 to 5 tokens, and why."""
        assert self._model is not None
        return {n: asdict(choice) for n, choice in choose(self._model.checkpoint, self._dtype).items()}

    def predict(self) -> int:
        """Load the predictor, if there is one; bytes that the process grew by."""
        before = resident()
        predictor = None if self._model is None else self._model.predictor
        if predictor is not None:
            predictor.scores("a few words")
            mx.clear_cache()
        return max(resident() - before, 0)

    def switches(self, selections: list[str], check: list[int]) -> list[dict[str, int]]:
        """Make one selection after another active, with an answer token each; memory after every one."""
        after = []
        for file in selections:
            done = self.switch(file)
            self._module(mx.array([check]))
            mx.clear_cache()
            after.append({"missing": done["missing"], **self.memory()})
        return after

    def bandwidth(self) -> float:
        """See `measure_bandwidth`."""
        return measure_bandwidth()

    def _moved(self) -> int:
        slots = [] if self._model is None else self._model.slots
        return sum(entry.bytes_moved for entry in slots)


def measure_bandwidth() -> float:
    """Bytes per second at which MLX reads memory here: the best of 5 sums and 5 products of 256 MB by a vector."""
    data = mx.ones((_BANDWIDTH_ELEMENTS // _COLUMNS, _COLUMNS), mx.float32)
    vector = mx.ones((_COLUMNS,), mx.float32)
    mx.eval(data, vector)
    ways: list[Callable[[], mx.array]] = [data.sum, lambda: data @ vector]
    best = float("inf")
    for _ in range(5):
        for way in ways:
            start = time.perf_counter()
            mx.eval(way())
            best = min(best, time.perf_counter() - start)
    return float(data.nbytes / best)
