"""A paired run repeats itself, goes on where it stopped, and refuses to go on as another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx import DataError, Model, SparsityPredictor, load
from ifprune_mlx.data.dataloader import DataMixture
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.tokenize import Example, encode
from ifprune_mlx.selection.predictor import Head, load_predictor
from ifprune_mlx.train import TrainConfig
from ifprune_mlx.train.checkpointing import METRICS, STATE
from ifprune_mlx.train.config import ARMS
from ifprune_mlx.train.full_finetune import FullModel
from ifprune_mlx.train.lora import LoRAModel
from ifprune_mlx.train.static_prior import load_prior, static_prior
from ifprune_mlx.train.trainable import FrozenModel
from ifprune_mlx.train.trainer import Trainer
from tests.ifprune_mlx.train.configs import config
from tests.tiny import write_checkpoint

WIDTHS = (128, 128)
WEIGHT = "model.layers.0.mlp.up_proj.weight"
CONFIG = config(
    selector=ARMS,
    iters=6,
    batch_size=2,
    learning_rate=1e-2,
    head_learning_rate=1e-2,
    scores_learning_rate=1e-2,
    gain_learning_rate=1e-2,
    head_start=0.3,
    warmup=2,
    densities="0.25,0.4-0.8",
    seed=5,
    lora_rank=4,
)
Start = Callable[..., Trainer]


def chats(tokenizer: TokenizerWrapper, domain: str, count: int = 12, length: int = 128) -> list[Example]:
    records = (
        Record(
            (
                {"role": "user", "content": f"{domain} question {i}"},
                {"role": "assistant", "content": f"{domain} " * (1 + i % 4)},
            ),
            domain,
        )
        for i in range(count)
    )
    encoded = [encode(tokenizer, record, length) for record in records]
    return [example for example in encoded if example is not None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("paired") / "checkpoint")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor folder: a head with biases on the model's first layer."""
    folder = tmp_path_factory.mktemp("predictor")
    mx.random.seed(11)
    arrays = [mx.random.normal(shape) for shape in ((8, 64), (8,), (256, 8), (256,))]
    Head(*arrays, WIDTHS, "last", "gelu", layers=1).save(folder / "head.safetensors")
    return folder


def predictor_of(folder: Path, model: Model, tokenizer: TokenizerWrapper) -> SparsityPredictor:
    return load_predictor(folder, model.module, tokenizer, 512, WIDTHS)


@pytest.fixture
def start(checkpoint: Path, head: Path) -> Start:
    """Begins a run, or goes on with it, as a new process would: everything is loaded anew."""

    def begin(
        folder: Path,
        config: TrainConfig = CONFIG,
        *,
        domains: tuple[str, ...] = ("a", "b"),
        count: int = 12,
        length: int = 128,
        weight: float = 1.0,
        predictor: Path = head,
        prior: float = 0.0,
        begin_with: Path | None = None,
        full: bool = False,
        **changes: Any,
    ) -> Trainer:
        config = replace(config, output=folder, start=begin_with, **changes)
        model, tokenizer = load(checkpoint)
        chosen = predictor_of(predictor, model, tokenizer)
        data = {name: (chats(tokenizer, name, count, length), weight if name == "a" else 1.0) for name in domains}
        fixed = static_prior(model, chosen, {"a": chats(tokenizer, "a")})
        lora = {"rank": config.lora_rank, "scale": config.lora_scale, "seed": config.seed}
        held = config.fine_tune_type == "none"
        return Trainer(
            FrozenModel(model) if held else FullModel(model) if full else LoRAModel(model, **lora),
            chosen,
            [scores + prior * np.arange(len(scores), dtype=np.float32) for scores in fixed],
            DataMixture(data, config.seed),
            config,
        )

    return begin


def go(run: Trainer, steps: int, save_every: int = 1) -> Trainer:
    for _ in range(steps):
        run.record(run.advance())
        if run.step % save_every == 0:
            run.save()
    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics file, without what the clock says."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    for a, b in zip(one.arms, other.arms, strict=True):
        assert a.parameters.keys() == b.parameters.keys()
        for name in a.parameters:
            assert mx.array_equal(a.parameters[name], b.parameters[name]), name


@pytest.mark.parametrize("full", [False, True])
def test_sequences_computed_together_train_as_one_by_one(start: Start, tmp_path: Path, full: bool) -> None:
    """Three of a batch of four, each at a density of its own, and a run that changes to it goes on; up to the order of
    sums."""
    settings = replace(CONFIG, batch_size=4, iters=4, learning_rate=1e-3, head_learning_rate=1e-3)
    alone = go(start(tmp_path / "alone", settings, full=full), 4)
    go(start(tmp_path / "together", settings, full=full), 1)
    together = go(start(tmp_path / "together", settings, full=full, micro_batch_size=3), 3)
    for one, other in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "together"), strict=True):
        for arm, domains in one["arms"].items():
            for domain, losses in domains.items():
                assert other["arms"][arm][domain] == pytest.approx(losses, rel=2e-3, abs=1e-5)
    before = start(tmp_path / "untrained", settings, full=full)
    for first, a, b in zip(before.arms, alone.arms, together.arms, strict=True):
        moved = [
            np.concatenate([np.ravel(arm.parameters[n] - first.parameters[n]) for n in a.parameters]) for arm in (a, b)
        ]
        # Adam moves a weight whose gradient is next to nothing by its sign.
        assert moved[0] @ moved[1] > 0.999 * np.linalg.norm(moved[0]) * np.linalg.norm(moved[1])


def test_a_step_says_how_long_it_took(start: Start, tmp_path: Path) -> None:
    """Seconds of this step, not of the clock."""
    assert 0 < start(tmp_path / "run").advance()["seconds"] < 600


def test_a_resumed_run_repeats_the_undisturbed_one(start: Start, tmp_path: Path) -> None:
    """6 steps, and 3 + 3 steps by two processes: the same metrics and weights to the last bit, with a learning head and
    several densities."""
    whole = go(start(tmp_path / "whole"), 6)
    go(start(tmp_path / "parts"), 3)
    second = start(tmp_path / "parts")
    assert second.step == 3
    go(second, 3)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert second.tokens == whole.tokens
    assert_same_weights(second, whole)
    learns = [line["head_learns"] for line in metrics(tmp_path / "whole")]
    assert learns == [False, False, True, True, True, True]
    fresh = start(tmp_path / "fresh").arms
    for before, after in zip(fresh, whole.arms, strict=True):
        moved = [
            name for name in before.parameters if not mx.array_equal(before.parameters[name], after.parameters[name])
        ]
        assert len(moved) == len(before.parameters)


def test_whole_weights_go_on_where_they_stopped(start: Start, tmp_path: Path) -> None:
    """As adapters do, to the last bit; `begin_with` takes them from an earlier run."""
    whole = go(start(tmp_path / "whole", full=True), 4)
    go(start(tmp_path / "parts", full=True), 2)
    second = go(start(tmp_path / "parts", full=True), 2)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert_same_weights(second, whole)
    fresh = start(tmp_path / "fresh", begin_with=tmp_path / "whole", full=True)
    for before, after in zip(whole.arms, fresh.arms, strict=True):
        assert all(mx.array_equal(before.adapter[name], after.adapter[name]) for name in before.adapter)
        assert not mx.array_equal(before.adapter[WEIGHT], whole.trainable.initial[WEIGHT])


@pytest.mark.parametrize(
    ("first", "words"), [(False, "fine tune type, rank, scale;"), (True, "rank, scale, fine tune")]
)
def test_another_fine_tune_type_is_refused(start: Start, tmp_path: Path, first: bool, words: str) -> None:
    """Whole weights are not gone on with as adapters, nor the other way round."""
    go(start(tmp_path / "run", full=first), 1)
    with pytest.raises(DataError, match=f"another {words}"):
        start(tmp_path / "run", full=not first)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_steps_after_the_last_state_are_done_again(start: Start, tmp_path: Path, stop: int) -> None:
    """A run that saves every second step and dies between two states repeats the steps that were lost, once."""
    go(start(tmp_path / "whole"), 6)
    go(start(tmp_path / "killed"), stop, save_every=2)
    again = start(tmp_path / "killed")
    assert again.step == stop - stop % 2
    go(again, 6 - again.step)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_torn_last_line_is_cut(start: Start, tmp_path: Path) -> None:
    """What a kill left half written goes; lines that are not of steps, such as those of distilling, stay."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / METRICS).write_text('{"explained": 0.5}\n')
    go(start(folder), 3)
    whole = metrics(folder)
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 4, "tok')
    again = go(start(folder), 1)
    assert metrics(folder)[:-1] == whole
    assert [line.get("step") for line in metrics(folder)] == [None, 1, 2, 3, 4]
    assert again.step == 4


def test_a_run_that_died_before_its_first_state_begins_anew(start: Start, tmp_path: Path) -> None:
    """Its lines go, so that no step is told twice."""
    go(start(tmp_path / "whole"), 2)
    go(start(tmp_path / "run"), 2, save_every=9)
    assert not (tmp_path / "run" / STATE).exists()
    go(start(tmp_path / "run"), 2)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_state_of_step_0_can_be_gone_on_from(start: Start, tmp_path: Path) -> None:
    """Saved before any step, as when a run stops at once; the run is the undisturbed one."""
    go(start(tmp_path / "whole"), 2)
    start(tmp_path / "run").save()
    second = go(start(tmp_path / "run"), 2)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert second.step == 2


def test_the_state_is_written_last(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed while it saves has its old state, and writes the folders again: none stays behind the state."""
    run = go(start(tmp_path / "run"), 1)
    before = (tmp_path / "run" / STATE).read_bytes()
    run.advance()
    monkeypatch.setattr("ifprune_mlx.train.trainer.save_prior", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert (tmp_path / "run" / STATE).read_bytes() == before


def test_what_is_saved_is_what_the_arms_are(start: Start, tmp_path: Path, checkpoint: Path) -> None:
    """The folders that other commands take hold the arms' weights, the head that learned, and the prior."""
    run = go(start(tmp_path / "run"), 4)
    for arm in run.arms:
        saved = run.trainable.read(tmp_path / "run" / "adapters" / arm.name)
        assert saved.keys() == arm.adapter.keys()
        assert all(mx.array_equal(saved[name], value) for name, value in arm.adapter.items())
    learned = Head.load(tmp_path / "run" / "predictor" / "head.safetensors")
    (arm,) = (arm for arm in run.arms if arm.name == "learned")
    assert mx.array_equal(learned.second, arm.parameters["head.second"])
    assert (learned.widths, learned.pooling, learned.activation, learned.layers) == (WIDTHS, "last", "gelu", 1)
    prior = mx.load(str(tmp_path / "run" / "prior.safetensors"))
    assert isinstance(prior, dict)
    for index, scores in enumerate(run.prior):
        np.testing.assert_array_equal(np.array(prior[f"prior.{index}"]), scores)


def test_what_a_kill_left_half_written_is_swept(start: Start, tmp_path: Path) -> None:
    """Temporary files of a process that was killed while it saved do not pile up."""
    go(start(tmp_path / "run"), 1)
    places = (".state-x.safetensors", ".prior-x.safetensors", ".metrics-x.jsonl", "predictor/.head-x.safetensors")
    more = ("adapters/none/.adapters-x.safetensors", "adapters/static/.adapter_config-x.json")
    torn = [tmp_path / "run" / place for place in (*places, *more)]
    for file in torn:
        file.write_bytes(b"half")
    start(tmp_path / "run")
    assert not any(file.exists() for file in torn)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e-3}, "another learning rate;"),
        ({"densities": "0.5"}, "another densities;"),
        ({"iters": 7, "batch_size": 4}, "another batch size, iterations;"),
        ({"selector": ("none", "static")}, "another arms;"),
        ({"teacher": 0.1}, "another teacher;"),
        ({"lora_rank": 8}, "another rank;"),
        ({"lora_scale": 1.0}, "another scale;"),
        ({"domains": ("a", "c")}, "another data, tokens;"),
        ({"count": 11}, "another data, tokens;"),
        ({"weight": 3.0}, "another data;"),
        ({"length": 36}, "another tokens;"),
        ({"prior": 1.0}, "another prior;"),
    ],
)
def test_another_run_is_refused(start: Start, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Whatever differs is named, and nothing in the folder is touched."""
    go(start(tmp_path / "run"), 1)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(DataError, match="holds a run with") as caught:
        start(tmp_path / "run", **changes)
    assert words in str(caught.value)
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_another_predictor_is_refused(start: Start, tmp_path: Path) -> None:
    """Its prior is what the static arm stands on."""
    go(start(tmp_path / "run"), 1)
    with pytest.raises(DataError, match="another predictor, prior;"):
        start(tmp_path / "run", predictor=other_head(tmp_path / "other"))


def other_head(folder: Path) -> Path:
    folder.mkdir()
    arrays = [mx.random.normal(shape) for shape in ((8, 64), (8,), (256, 8), (256,))]
    Head(*arrays, WIDTHS, "last", "gelu", layers=1).save(folder / "head.safetensors")
    return folder


def test_a_damaged_state_is_refused(start: Start, tmp_path: Path) -> None:
    """A file that is cut off, or is none of a run."""
    go(start(tmp_path / "run"), 1)
    file = tmp_path / "run" / STATE
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(DataError, match="cut short"):
        start(tmp_path / "run")
    mx.save_safetensors(str(file), {"x": mx.zeros(3)})
    with pytest.raises(DataError, match="other settings"):
        start(tmp_path / "run")


def test_start_begins_with_the_adapters_of_an_earlier_run(start: Start, tmp_path: Path) -> None:
    """Every arm with its own, fresh otherwise: step 0, no moments; a resumed run does not look at it again."""
    first = go(start(tmp_path / "first"), 2)
    second = start(tmp_path / "second", begin_with=tmp_path / "first")
    assert second.step == 0
    for old, new in zip(first.arms, second.arms, strict=True):
        assert all(mx.array_equal(old.adapter[name], new.adapter[name]) for name in old.adapter)
    go(second, 1)
    moved = start(tmp_path / "second", begin_with=tmp_path / "first")
    assert moved.step == 1
    assert_same_weights(moved, second)


def test_start_without_such_adapters_is_refused(start: Start, tmp_path: Path) -> None:
    """An earlier run that had no such arm, or none at all."""
    go(start(tmp_path / "first", replace(CONFIG, selector=("static",))), 1)
    for earlier in (tmp_path / "first", tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"adapters\.safetensors: cannot be read"):
            start(tmp_path / "second", begin_with=earlier)


def test_all_arms_see_the_same_batches(start: Start, tmp_path: Path) -> None:
    """The same tokens of the same domains every step, however many arms there are."""
    go(start(tmp_path / "all"), 3)
    go(start(tmp_path / "one", replace(CONFIG, selector=("static",))), 3)
    for line, alone in zip(metrics(tmp_path / "all"), metrics(tmp_path / "one"), strict=True):
        tokens = [{name: d["tokens"] for name, d in arm.items()} for arm in line["arms"].values()]
        assert tokens[0] == tokens[1] == tokens[2]
        assert line["arms"]["static"] == alone["arms"]["static"]
        assert line["gradient_norm"]["static"] == alone["gradient_norm"]["static"]


def test_training_lowers_the_loss(start: Start, tmp_path: Path) -> None:
    """On chats seen again and again every arm's cross-entropy falls."""
    settings = replace(CONFIG, iters=25, densities="0.5", seed=1)
    run = go(start(tmp_path / "run", settings, domains=("a",), count=4), 25, save_every=25)
    lines = metrics(tmp_path / "run")
    for arm in run.arms:
        first, last = (
            np.mean([line["arms"][arm.name]["a"]["ce"] for line in part]) for part in (lines[:3], lines[-3:])
        )
        assert last < 0.7 * first


def test_densities_are_drawn_from_every_range(start: Start, tmp_path: Path) -> None:
    """A function of seed, step and row; each range as likely, values within it."""
    run = start(tmp_path / "run")
    drawn = []
    for step in range(200):
        run.step = step
        drawn += [run._density(row) for row in range(2)]
    low = [density for density in drawn if density == 0.25]
    rest = [density for density in drawn if density != 0.25]
    assert 160 < len(low) < 240
    assert 0.4 <= min(rest) < 0.42
    assert 0.78 < max(rest) <= 0.8


def test_the_learning_rate_warms_up_and_falls(start: Start, tmp_path: Path) -> None:
    """Up to the full rate after `warmup` steps, then by a cosine towards a tenth."""
    go(start(tmp_path / "run", replace(CONFIG, selector=("none",), iters=8)), 8)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2], rel=1e-5)
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    assert 1e-3 <= rates[-1] < 2.5e-3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"selector": ()}, "at most once"),
        ({"selector": ("static", "static")}, "at most once"),
        ({"selector": ("static", "random")}, "at most once"),
        ({"densities": "0-0.5"}, "above 0 and at most 1"),
        ({"densities": "0.5-1.5"}, "above 0 and at most 1"),
        ({"densities": "0.8-0.2"}, "the lower first"),
        ({"densities": "nan-0.5"}, "above 0 and at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], words: str) -> None:
    """Arms that are unknown, missing or given twice, and densities that are none."""
    with pytest.raises(DataError, match=words):
        config(**wrong)


CHOOSING = ("learned", "static", "static-learned")


def test_a_model_held_still_is_healed_from_there(start: Start, tmp_path: Path) -> None:
    """Head, scores and gains learn while the model stays as it is; a healing run begins with what they learned."""
    held = replace(CONFIG, fine_tune_type="none", selector=CHOOSING, head_start=0.0)
    run = go(start(tmp_path / "held", held), 3)
    assert {name for arm in run.arms for name in arm.parameters} >= {"scores.neurons", "gains.neurons", "head.second"}
    assert all(arm.adapter == {} for arm in run.arms)
    assert not list((tmp_path / "held").rglob("adapters.safetensors"))
    healing = start(tmp_path / "healed", replace(CONFIG, selector=CHOOSING), begin_with=tmp_path / "held")
    for before, after in zip(run.arms, healing.arms, strict=True):
        assert mx.array_equal(before.parameters["gains.neurons"], after.parameters["gains.neurons"])
        assert after.adapter.keys() == healing.trainable.initial.keys()
    order = [np.argsort(np.array(run_.arms[2].parameters["scores.neurons"])) for run_ in (run, healing)]
    np.testing.assert_array_equal(*order)
    with pytest.raises(DataError, match="would drop"):
        start(tmp_path / "again", held, begin_with=go(healing, 1).config.output)


def test_learned_scores_begin_with_a_file(start: Start, tmp_path: Path) -> None:
    """A prior's file, of this model's widths."""
    go(start(tmp_path / "first"), 2)
    file = tmp_path / "first" / "prior-static-learned.safetensors"
    run = start(tmp_path / "second", scores=file)
    wanted = np.concatenate(load_prior(file, WIDTHS))
    np.testing.assert_allclose(np.exp(np.array(run.arms[2].parameters["scores.neurons"])), wanted, rtol=1e-5)
    with pytest.raises(DataError, match="other widths"):
        load_prior(file, (128, 64))
