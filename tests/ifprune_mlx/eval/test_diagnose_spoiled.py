"""The doctor calls `dynamic` only what is: a trained predictor yes, the same one spoiled no.

On experts that prompts name, so that two prompts of a domain need different neurons, and on the real SmolLM2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import ifprune_convert
from ifprune_convert.calibrate import shipped_examples
from ifprune_mlx import Model, load
from ifprune_mlx.data.tokenize import Example, encode
from ifprune_mlx.eval.diagnose import Diagnosis, diagnose
from ifprune_mlx.selection.predictor import Head, SparsityPredictor
from ifprune_mlx.selection.selection import Selection, top_k
from ifprune_mlx.selection.selectors import LearnedSelector, Selector
from tests.planted import Table, distil_experts

DOMAINS = ("seed", "oasst")
"""Sources of shipped chats; picked because an early, weak predictor was told apart on these with the fewest prompts."""
PROMPT, ANSWER = 80, 32
"""Tokens of real chats: the most of a prompt, and the most of an answer that are measured."""


@dataclass(frozen=True)
class Patient:
    """A model with a trained predictor, and chats by domain to judge it on."""

    model: Model
    predictor: SparsityPredictor
    data: Mapping[str, Sequence[Example]]
    keep: tuple[int, ...]

    def judge(self, selector: Selector) -> Diagnosis:
        """The doctor's verdict on a selector."""
        return diagnose(self.model, self.data, selector, self.keep)

    def with_head(self, head: Head, folder: Path) -> LearnedSelector:
        """The predictor with another head, which goes through a predictor folder."""
        head.save(folder / "head.safetensors")
        return LearnedSelector(self.model, self.predictor.with_head(Head.load(folder / "head.safetensors")))


def shuffled(head: Head) -> Head:
    """Rows of head2 dealt out among the neurons of each layer; each keeps its bias, so that the prior stays right."""
    generator = np.random.default_rng(0)
    starts = np.cumsum([0, *head.widths[:-1]])
    order = [start + generator.permutation(width) for start, width in zip(starts, head.widths, strict=True)]
    return replace(head, second=head.second[mx.array(np.concatenate(order))])


def prior_alone(head: Head) -> Head:
    """What the head says to every instruction: its last bias."""
    return replace(head, second=mx.zeros_like(head.second))


def domain_means(patient: Patient) -> Table:
    """One selection a domain, from the mean features of its prompts: as the head is linear, from their mean scores."""
    assert patient.predictor.head.activation == "none"
    patient.model.switch(None)
    selections: dict[str, Selection] = {}
    for chats in patient.data.values():
        scores = [patient.predictor.scores(chat.instruction) for chat in chats]
        means = [np.mean(layer, axis=0) for layer in zip(*scores, strict=True)]
        selections |= dict.fromkeys([chat.instruction for chat in chats], top_k(means, patient.keep, "mean"))
    return Table(selections)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    """Prompts that name three of eight groups of their domain's neurons, and a density that has room for three."""
    made = distil_experts(tmp_path_factory.mktemp("experts"), count=16, named=3, chats=48, held_out=16)
    yield Patient(made.model, made.predictor, made.data, made.keep)
    made.model.close()


def test_planted_the_trained_predictor_is_dynamic(planted: Patient) -> None:
    found = planted.judge(LearnedSelector(planted.model, planted.predictor))
    assert found.verdict == "dynamic", found.explanation
    value = found.to_dict()
    assert value["matched_nll"] < min(value["mismatched_nll"], value["static_nll"])
    assert value["mismatched_nll"] < value["cross_domain_nll"]


def test_planted_shuffled_rows_are_not(planted: Patient, tmp_path: Path) -> None:
    found = planted.judge(planted.with_head(shuffled(planted.predictor.head), tmp_path))
    assert found.verdict in ("static", "broken"), found.explanation
    # Not for want of variety.
    assert found.to_dict()["agreement_within"] < 0.5


def test_planted_domain_means_are_not(planted: Patient) -> None:
    found = planted.judge(domain_means(planted))
    assert found.verdict == "static", found.explanation
    # They do know their domain.
    assert found.to_dict()["matched_nll"] < found.to_dict()["cross_domain_nll"]


def test_planted_the_prior_alone_is_not(planted: Patient, tmp_path: Path) -> None:
    found = planted.judge(planted.with_head(prior_alone(planted.predictor.head), tmp_path))
    assert found.verdict == "static", found.explanation
    assert found.to_dict()["agreement_across"] == 1


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Patient]:
    """Ten shipped chats of each domain, and half of the neurons."""
    model, tokenizer = load(smollm2)
    if model.predictor is None:
        pytest.skip("the embedded checkpoint has no predictor")
    lines = (Path(ifprune_convert.__file__).parent / "data" / "calibration.jsonl").read_text(encoding="utf-8")
    data: dict[str, list[Example]] = {domain: [] for domain in DOMAINS}
    for line, record in zip(lines.splitlines(), shipped_examples(), strict=True):
        chosen = data.get(json.loads(line)["source"])
        if chosen is not None and len(chosen) < 10:
            chat = encode(tokenizer, record, 512)
            if chat is not None and chat.prompt_length <= PROMPT:
                chosen.append(cut(chat, ANSWER))
    yield Patient(model, model.predictor, data, model.keep(0.5))
    model.close()


def cut(chat: Example, answer: int) -> Example:
    """A chat with the first tokens of its answer only."""
    end = chat.prompt_length + answer
    return replace(chat, tokens=chat.tokens[:end], mask=chat.mask[:end])


@pytest.mark.real
def test_real_the_trained_predictor_is_dynamic(real: Patient) -> None:
    found = real.judge(LearnedSelector(real.model, real.predictor))
    assert found.verdict == "dynamic", found.explanation
