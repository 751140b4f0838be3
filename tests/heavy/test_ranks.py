"""Ranks compute as one process does: every kind of tiny checkpoint over two and four, and SmolLM2; many minutes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx.checkpoint.format import Quantization
from tests.ifprune_mlx.parallel.rank import SENSIBLE
from tests.ifprune_mlx.parallel.test_ranks_compute_as_one import GEMMA3, check
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("count", [2, 4])
def test_logits_and_greedy_answers_are_those_of_one_process(count: int, tmp_path: Path) -> None:
    """Over 20 switches between arbitrary selections; of four ranks, none has a head of keys to itself."""
    jobs = []
    for family, changes in (("llama", {}), ("qwen3", {"tie_word_embeddings": False}), ("mistral", GEMMA3)):
        for packing in (None, Quantization(32, 4, "affine")):
            name = f"{changes.get('model_type', family)}-{'float' if packing is None else '4bit'}"
            folder = write_checkpoint(tmp_path / name, family, Options(packing), **changes)
            jobs += [("ram", folder), ("ssd", folder)]
    check(jobs, count, tmp_path)


@pytest.mark.parametrize(("bits", "count"), [(None, 2), (4, 2), (None, 4)])
def test_smollm2_on_ranks(
    smollm2_base: Path,
    smollm2_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int | None,
    count: int,
) -> None:
    """Its 9 heads do not come out even, so that its layers are dealt out."""
    checkpoint = smollm2_base
    if bits is not None:
        checkpoint = tmp_path / "packed"
        convert(open_source(smollm2_gguf), checkpoint, Options(Quantization(32, bits, "affine"), dtype=mx.float32))
    # Its logits differ by 2e-3 even between the two residencies of one process: they order a layer's neurons otherwise.
    monkeypatch.setenv(SENSIBLE, "1")
    check([("ram", checkpoint), ("ssd", checkpoint)], count, tmp_path, tolerance=None, limit=3600)
