"""Peak memory of a conversion: that of one FFN of the paper's widths, however many layers and adapters there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from scripts.make_synthetic import CONFIG, measure, write_checkpoint


def write_adapter(folder: Path) -> Path:
    """A LoRA adapter of rank 8 for all FFNs of two layers, without building the model."""
    width, hidden = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    linear = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    tensors: dict[str, mx.array] = {}
    for layer in range(2):
        for name, (inputs, outputs) in linear.items():
            stem = f"model.layers.{layer}.mlp.{name}"
            tensors |= {f"{stem}.lora_a": mx.full((inputs, 8), 0.01), f"{stem}.lora_b": mx.full((8, outputs), 0.01)}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads anonymous RSS from /proc")
@pytest.mark.slow
def test_two_layers_of_the_papers_widths(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "source", layers=2, vocabulary=1024)
    assert written > 650_000_000
    result = measure(tmp_path / "source", tmp_path / "out")
    # gate, up and both interleaved are 403 MB; a layer that stayed in memory would add 302 MB.
    assert result["peak_anonymous_rss"] < 800_000_000
    assert result["converted"]["ffns"] == 2
    adapter = write_adapter(tmp_path / "adapter")
    result = measure(tmp_path / "source", tmp_path / "out", "--overwrite", "--adapter", str(adapter))
    assert result["peak_anonymous_rss"] < 800_000_000
    for file in (*(tmp_path / "source").iterdir(), *(tmp_path / "out").iterdir()):
        file.unlink()
