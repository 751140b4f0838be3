"""Memory is wired when the first model opens, as long as any is open, and on every way to a token."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import batch_generate

from ifprune_convert.pipeline import Options
from ifprune_mlx import History, Session, load, model
from ifprune_mlx.bench.worker import Worker, _wired
from ifprune_mlx.device import Limits
from ifprune_mlx.model_lock import ModelLock
from ifprune_mlx.selection.selectors import Instruction, make_selector
from ifprune_mlx.serving.engine import engine as engines
from tests.ifprune_mlx.generating import TOKENS, A, answer
from tests.ifprune_mlx.serving.engine.engines import B, make_request, serving, together
from tests.ifprune_mlx.stand_in_gpu import StandInGPU
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

ALL = 5 << 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wired")
    return write_checkpoint(folder / "checkpoint", options=Options(predictor=write_predictor(folder / "predictor")))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInGPU]:
    """A Mac's GPU, no model open, and a note of the wired limit at every call of a model."""
    monkeypatch.setattr(model, "limits", Limits())
    gpu = StandInGPU(8 << 30, ALL).install(monkeypatch)
    check, seen = ModelLock.check, set()

    def look(lock: ModelLock) -> None:
        seen.add(gpu.limit)
        check(lock)

    monkeypatch.setattr(ModelLock, "check", look)
    yield gpu
    assert seen <= {ALL}


def test_every_way_to_a_token_is_wired_and_wires_nothing_anew(
    checkpoint: Path, gpu: StandInGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, tokenizer = load(checkpoint)
    tiny = loaded, tokenizer
    assert gpu.changes == [ALL]
    for selector in ("learned", "activation", "static"):
        make_selector(loaded, selector).select(Instruction("text", tuple(TOKENS)), loaded.keep())
        answer(tiny, TOKENS, selector=selector, max_tokens=3)
    History.empty(loaded).read(loaded, TOKENS)
    Session(loaded, tokenizer).ask("Hello", max_tokens=2)
    answer(tiny, TOKENS, selection=A, max_tokens=3)
    ours = gpu.calls
    batch_generate(loaded, tokenizer, [TOKENS, TOKENS[:5]], max_tokens=3)
    with serving(tiny) as engine:
        together(engine, make_request(), make_request(selection=B))
    monkeypatch.setattr(engines, "can_batch", lambda _: False)
    with serving(tiny) as engine:  # one lane
        together(engine, make_request(), make_request())
    assert gpu.calls > ours  # mlx-lm sets its limit again and again, and
    assert gpu.changes == [ALL]  # MLX has nothing to do
    loaded.close()
    assert gpu.changes == [ALL, 0]
    gc.collect()
    assert gpu.limit == 0  # nor does a generator of mlx-lm that lives on wire anything afterwards


def test_the_last_one_that_closes_gives_the_limit_back(checkpoint: Path, gpu: StandInGPU) -> None:
    gpu.set_wired_limit(77)
    first, second = load(checkpoint)[0], load(checkpoint)[0]
    first.close()
    assert gpu.limit == ALL
    third, _ = load(checkpoint)
    second.close()
    third.close()
    third.close()
    assert gpu.changes == [77, ALL, 77]
    gpu.set_wired_limit(ALL)  # the user's own, by chance ours
    with closing(load(checkpoint)[0]):
        pass
    assert gpu.limit == ALL


@pytest.mark.parametrize("changed", [False, True])
def test_after_models_that_were_dropped_the_users_limit_counts(
    checkpoint: Path, gpu: StandInGPU, changed: bool
) -> None:
    gpu.set_wired_limit(77)
    dropped, _ = load(checkpoint)
    del dropped
    gc.collect()
    if changed:
        gpu.set_wired_limit(78)
    with closing(load(checkpoint)[0]):
        assert gpu.limit == ALL
    assert gpu.limit == 77 + changed


def test_without_a_macs_gpu_nothing_is_set(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "limits", Limits())
    calls: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    with closing(load(checkpoint)[0]):
        pass
    assert calls == []


@pytest.mark.parametrize("residency", ["ram", None])
def test_of_the_benchs_workers_only_the_one_that_works_is_wired(
    checkpoint: Path, gpu: StandInGPU, residency: str | None
) -> None:
    folder = checkpoint if residency else checkpoint.with_name("source-of-checkpoint")
    worker = Worker(folder, residency, None)
    assert gpu.limit == 0
    with _wired():
        assert gpu.limit == ALL
        worker.run(TOKENS, 3)
    assert gpu.limit == 0
    with pytest.raises(ZeroDivisionError), _wired():
        _ = 1 / 0
    assert gpu.limit == 0
    if worker._model is not None:
        with _wired():
            worker._model.close()
