"""`ifprune_mlx.bench.benchmark`: real processes on a tiny checkpoint; what it counts, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert.bench_models import make_noise, make_plain
from ifprune_convert.synthetic import SHAPES, NoiseSource, Shape, shape_of
from ifprune_mlx import IfpruneError
from ifprune_mlx.bench.benchmark import BenchConfig, bench, bytes_per_token, interval
from ifprune_mlx.bench.process_memory import most_resident, resident
from ifprune_mlx.bench.worker import measure_bandwidth, start_worker
from ifprune_mlx.checkpoint.format import Checkpoint
from tests.tiny import CONFIGS

TINY = Shape(CONFIGS["llama"] | {"intermediate_size": 512}, 0.25, CONFIGS["llama"])
KEEP = (128, 128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_noise(tmp_path_factory.mktemp("noise"), TINY, mx.float32, None, lambda *_: None)


def test_every_row_is_measured_and_the_ratios_are_of_the_same_rounds(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = make_plain(tmp_path, checkpoint, KEEP, lambda *_: None)
    seen: list[tuple[int, int]] = []
    config = BenchConfig(checkpoint, plain.dense, plain.static, True, KEEP, None, 24, 4, 2, tmp_path)
    result = bench(config, lambda done, total: seen.append((done, total)))
    json.dumps(result)
    assert [row["name"] for row in result["rows"]] == ["mlx-lm dense", "dense", "sliced", "mlx-lm static", "sliced ssd"]
    assert seen == [(done, 15) for done in range(1, 16)]
    ratios = result["ratios"]
    assert None not in ratios.values()
    # 26 of 128 neurons a layer are others at an overlap of 0.8; in memory as many make room for them.
    assert ratios["switch_bytes_share"] == pytest.approx(26 / 128)
    assert ratios["switch_written_share"] == pytest.approx(52 / 128)
    for row in result["rows"]:
        assert row["moved_in_decode"] == 0
        assert min(row[what] for what in ("prefill_tok_s", "decode_tok_s", "ttft_s", "peak_memory", "rss")) > 0
        assert (row["select_s"] > 0) == (row["name"] in ("sliced", "sliced ssd"))
    low, high = (result["intervals"]["decode_vs_static"][end] for end in ("low", "high"))
    assert low <= high


def test_without_plain_models_their_ratios_are_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = bench(BenchConfig(checkpoint, None, None, False, KEEP, "float16", 8, 3, 1, tmp_path))
    assert [row["name"] for row in result["rows"]] == ["dense", "sliced"]
    assert result["ratios"]["decode_vs_static"] is None
    assert result["ratios"]["resident_vs_static"] is None
    assert result["intervals"] == {}
    assert list(result["down_kernels"]) == ["1", "2", "3", "4", "5"]
    assert all(set(choice) == {"kernel", "reason"} for choice in result["down_kernels"].values())


def test_a_model_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(IfpruneError, match="no such folder"), start_worker(tmp_path / "no", "ram", None, "none"):
        pass


def test_bytes_of_a_token_are_those_of_a_plain_model_of_that_size(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = make_plain(tmp_path, checkpoint, KEEP, lambda *_: None)
    for folder, keep in ((plain.dense, (512, 512)), (plain.static, KEEP)):
        arrays = mx.load(str(next(folder.glob("model-*.safetensors"))))
        assert bytes_per_token(checkpoint, keep) == sum(array.nbytes for array in arrays.values())


def test_an_embedding_that_is_only_looked_up_costs_nothing(tmp_path: Path) -> None:
    made = make_noise(tmp_path, Shape(CONFIGS["llama-untied"], 0.5, None), mx.float32, None, lambda *_: None)
    table = 320 * 64 * 4
    assert bytes_per_token(made, (128, 128)) == made.weight_bytes - table


def test_the_machine_and_the_process_are_measured() -> None:
    assert 10**8 < measure_bandwidth() < 10**13
    assert 10**7 < resident() <= 1.01 * most_resident() < 10**11


def test_an_interval_covers_its_median() -> None:
    found = interval([1.0, 1.1, 0.9, 1.0, 1.05])
    assert found["low"] <= found["median"] <= found["high"]


@pytest.mark.parametrize(
    ("name", "billions", "active"), [("paper-6b", 6.4, 3.06), ("paper-9b", 9.2, 3.06), ("paper-12b", 12.0, 3.06)]
)
def test_the_papers_shapes_have_the_papers_sizes(name: str, billions: float, active: float) -> None:
    shape = SHAPES[name]
    sizes = NoiseSource(shape, mx.float32).shapes.values()  # nothing is computed
    total = sum(mx.zeros(size).size for size in sizes) / 1e9
    neurons = 56 * 3 * 2048 * shape.config["intermediate_size"] / 1e9
    assert total == pytest.approx(billions, rel=0.03)
    assert total - (1 - shape.density) * neurons == pytest.approx(active, rel=0.05)


def test_fewer_layers_keep_the_proportions() -> None:
    whole, part = SHAPES["paper-9b"], SHAPES["paper-9b"].scaled(7)
    assert part.config["num_hidden_layers"] == 7
    assert part.config["vocab_size"] == whole.config["vocab_size"] // 8
    assert part.backbone is not None
    assert part.backbone["num_hidden_layers"] == 2
    assert part.density == whole.density
    with pytest.raises(IfpruneError, match="57 layers: the shape has 56"):
        whole.scaled(57)


def test_a_config_is_a_shape(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["qwen3"]))
    assert shape_of(str(file)).config["model_type"] == "qwen3"
    file.write_text("{}")
    with pytest.raises(IfpruneError, match="has no model_type"):
        shape_of(str(file))
    with pytest.raises(IfpruneError, match="none of paper-6b, paper-9b"):
        shape_of("paper-7b")
