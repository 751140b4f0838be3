"""Two and four ranks, a ring on loopback, compute what one process computes for the same selections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from mlx import nn

from ifprune_convert.pipeline import Options
from ifprune_mlx import load
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.parallel.sharding import VocabularyRows
from ifprune_mlx.tokenizer import embedding_rows
from tests.ifprune_mlx.parallel.rank import FEWER, walk
from tests.ifprune_mlx.parallel.ring import run_ring
from tests.ifprune_mlx.reference import TOLERANCE
from tests.tiny import write_checkpoint

GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "sliding_window_pattern": 2,
}
PROGRAM = ["-m", "tests.ifprune_mlx.parallel.rank"]


def check(
    jobs: list[tuple[str, Path]], count: int, tmp_path: Path, *, tolerance: float | None = TOLERANCE, limit: float = 900
) -> None:
    """Every (residency, checkpoint) in turn, by ranks and by this process.

    Args:
        tolerance: of logits; None is the most by which one process's own two residencies differ, and 1e-4 at least.
        limit: seconds that the ranks may take.
    """
    arguments = [*PROGRAM, tmp_path, *(f"{at}={folder}" for at, folder in jobs)]
    for code, _, said in run_ring(arguments, count, tmp_path, limit):
        assert code == 0, said
    alone = [walk(load(folder, residency=residency)[0]) for residency, folder in jobs]
    if tolerance is None:
        tolerance = max(TOLERANCE, furthest(alone[0], alone[1]))
    for number, (residency, folder) in enumerate(jobs):
        ours, theirs = np.load(tmp_path / f"{number}.npz"), alone[number]
        print(f"{residency}: logits differ by {furthest(ours, theirs):.1e} at most, {tolerance:.1e} may be")
        assert set(theirs) <= set(ours)
        for name, values in theirs.items():
            where = f"{folder.name}, {residency}: {name}"
            if name in logits_in(theirs):
                np.testing.assert_allclose(ours[name], values, atol=tolerance, rtol=0, err_msg=where)
            else:
                np.testing.assert_array_equal(ours[name], values, err_msg=where)


def furthest(ours: Mapping[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference of logits that both have."""
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in logits_in(theirs) if name in ours)


def logits_in(found: dict[str, np.ndarray]) -> list[str]:
    """The names of logits in what `walk` gives."""
    return [name for name in found if name.startswith("logits")]


def test_two_ranks_compute_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By heads, and, with the vocabulary and whole layers dealt out, for a family that mlx-lm does not split."""
    monkeypatch.setenv(FEWER, "3")
    packed = Options(Quantization(32, 4, "affine"))
    by_heads = write_checkpoint(tmp_path / "by-heads", "qwen3", tie_word_embeddings=False)
    by_layers = write_checkpoint(tmp_path / "by-layers", "mistral", packed, **GEMMA3)
    check([("ram", by_heads), ("ssd", by_layers)], 2, tmp_path)


def test_a_table_that_ranks_share_still_tells_all_its_rows() -> None:
    """A predictor checks its token ids against the whole vocabulary, not against a rank's part of it."""

    class TwoRanks:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 1

    module = nn.Module()
    module.embed_tokens = VocabularyRows(nn.Embedding(10, 4), TwoRanks())
    assert module.embed_tokens.table.weight.shape[0] == 5
    assert embedding_rows(module) == 10
