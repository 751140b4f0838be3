"""Adapters that PEFT saved, fused while converting, against PEFT on PyTorch. float32.

`IFPRUNE_TORCH_PYTHON` names an interpreter that has torch, transformers and peft; by default it is this one. It runs on
its own, since its OpenMP and BLAS do not share a process with others.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import load
from ifprune_mlx.errors import SourceError
from tests.heavy.outside import run_torch
from tests.tiny import write_tokenizer

pytestmark = pytest.mark.heavy

CASES = (
    "plain", "rslora", "dora", "patterns", "bias-all", "bias-lora-only", "lora-bias", "saved-modules", "embeddings",
    "tied", "tied-saved",
)  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `peft_adapters.py` wrote."""
    out = tmp_path_factory.mktemp("peft")
    run_torch("peft_adapters.py", "peft", [str(out)])
    return out


def logits(source: Path, adapter: Path | None, out: Path) -> mx.array:
    """Of the dense checkpoint."""
    write_tokenizer(source)
    convert(open_source(source), out, Options(adapter=adapter))
    model, _ = load(out)
    result = model(mx.arange(0, 84, 7)[None])[0]
    mx.eval(result)
    model.close()
    return result


@pytest.mark.parametrize("case", CASES)
def test_fused_is_what_peft_computes(cases: Path, tmp_path: Path, case: str) -> None:
    folder = cases / case
    found = np.array(logits(folder / "source", folder / "adapter", tmp_path / "fused"))
    base = np.array(logits(folder / "source", None, tmp_path / "base"))
    # PEFT itself says that merging into tied embeddings goes wrong: it adds the adapter twice.
    for name in ("adapted",) if case == "tied" else ("adapted", "merged"):
        expected = np.load(folder / f"{name}.npy")
        assert np.abs(expected - base).max() > 0.1
        assert np.abs(expected - found).max() < 1e-4 * max(np.abs(expected).max(), 1)


def test_dora_on_embeddings_is_refused(cases: Path, tmp_path: Path) -> None:
    folder = cases / "embeddings-dora"
    with pytest.raises(SourceError, match=r"changes the embedding model\.embed_tokens by DoRA"):
        logits(folder / "source", folder / "adapter", tmp_path / "out")
