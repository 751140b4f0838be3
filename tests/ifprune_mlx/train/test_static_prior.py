"""What the static arm ranks neurons by: the predictor's mean over training instructions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ifprune_mlx import DataError, load
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.tokenize import Example, encode
from ifprune_mlx.selection.predictor import load_predictor
from ifprune_mlx.train.attribution import Targets
from ifprune_mlx.train.static_prior import INSTRUCTIONS, priors, save_prior, static_prior
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

WIDTHS = (128, 128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("static") / "checkpoint")


@pytest.fixture(scope="module")
def predictor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predictor(tmp_path_factory.mktemp("static") / "predictor")


def examples(tokenizer: object, texts: list[str]) -> list[Example]:
    found = []
    for text in texts:
        record = Record(({"role": "user", "content": text}, {"role": "assistant", "content": "yes"}), "a")
        encoded = encode(tokenizer, record, 128)  # type: ignore[arg-type]
        assert encoded is not None
        found.append(encoded)
    return found


def test_it_is_the_mean_of_the_scores_with_every_domain_alike(checkpoint: Path, predictor_folder: Path) -> None:
    model, tokenizer = load(checkpoint)
    predictor = load_predictor(predictor_folder, model.module, tokenizer, 512, WIDTHS)
    texts = {"a": ["add two numbers", "write a loop"], "b": ["why is the sky blue"]}
    data = {name: examples(tokenizer, each) for name, each in texts.items()}
    seen: list[tuple[int, int]] = []
    found = static_prior(model, predictor, data, progress=lambda done, total: seen.append((done, total)))
    scores = {text: np.concatenate(predictor.scores(text)) for each in texts.values() for text in each}
    means = [np.mean([scores[text] for text in each], axis=0) for each in texts.values()]
    expected = np.mean(means, axis=0)
    assert [prior.shape for prior in found] == [(128,), (128,)]
    # The random head's scores are large, and scaled down.
    assert np.abs(expected).max() > 80
    logs = np.log(np.concatenate(found))
    np.testing.assert_allclose(logs, expected * 80 / np.abs(expected).max(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.argsort(logs), np.argsort(expected))
    assert (np.concatenate(found) > 0).all()
    assert seen == [(1, 3), (2, 3), (3, 3)]
    # Not what is left without an instruction: the last bias, or 0.
    assert len({tuple(np.argsort(-values)[:64]) for values in (expected[:128], scores["write a loop"][:128])}) == 2


def test_of_a_large_domain_a_sample_is_read_and_always_the_same(checkpoint: Path, predictor_folder: Path) -> None:
    model, tokenizer = load(checkpoint)
    predictor = load_predictor(predictor_folder, model.module, tokenizer, 512, WIDTHS)
    data = {"a": examples(tokenizer, [f"question {i}" for i in range(INSTRUCTIONS + 40)])}
    seen: list[int] = []
    one = static_prior(model, predictor, data, progress=lambda done, total: seen.append(total))
    other = static_prior(model, predictor, data)
    assert seen == [INSTRUCTIONS] * INSTRUCTIONS
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first, second)


def test_without_a_predictor_it_is_the_checkpoints(checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    for found, expected in zip(static_prior(model, None, {}), model.prior, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_an_earlier_runs_prior_is_kept(checkpoint: Path, predictor_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(checkpoint)
    predictor = load_predictor(predictor_folder, model.module, tokenizer, 512, WIDTHS)
    kept = [np.linspace(1, 2, width, dtype=np.float32) for width in WIDTHS]
    (tmp_path / "empty").mkdir()
    save_prior(tmp_path / "run" / "prior.safetensors", kept)
    folders = [tmp_path / "empty", tmp_path / "run"]
    data = {"a": examples(tokenizer, ["hello"])}
    for found, expected in zip(static_prior(model, predictor, data, folders), kept, strict=True):
        np.testing.assert_array_equal(found, expected)
    (tmp_path / "empty" / "prior.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="not a safetensors file"):
        static_prior(model, predictor, data, folders)


def test_priors_of_targets_are_geometric_means_with_every_domain_alike() -> None:
    importance = np.random.default_rng(0).uniform(0.2, 3, (5, 6)).astype(np.float16)
    found = priors(Targets(np.zeros((5, 2), np.float32), importance, ["a", "b", "a", "a", "b"], 1, (4, 2)))
    assert list(found) == ["a", "b", "all"]
    for start, end, index in ((0, 4, 0), (4, 6, 1)):
        part = importance[:, start:end].astype(np.float64)
        logs = np.log(part / part.mean(axis=1, keepdims=True) + 0.05)
        a, b = logs[[0, 2, 3]].mean(axis=0), logs[[1, 4]].mean(axis=0)
        for name, expected in (("a", a), ("b", b), ("all", (a + b) / 2)):
            np.testing.assert_allclose(found[name][index], np.exp(expected), rtol=1e-5)
