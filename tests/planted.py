"""Prompts whose answers need their own neurons, by construction: the model wrote each on a selection of its own.

Whoever selects for a prompt what its answer was written on sees the lowest loss; no other selection knows the answer.

Two kinds. `plant`: arbitrary selections of a random model, which nothing in the prompt gives away. `Experts`: neurons
that the model itself uses for what their prompt names and for nothing else, so that they can be learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import printable

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Instruction, Model, Selected, Selection, load
from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.tokenize import Example, encode_all
from ifprune_mlx.selection.predictor import SparsityPredictor, load_predictor
from ifprune_mlx.train.attribution import Backbone, measure
from ifprune_mlx.train.distill import distill
from tests.tiny import CONFIGS, write_source

_D_MODEL, _D_FFN, _LAYERS, _VOCABULARY = (
    int(CONFIGS["llama-untied"][key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
)


@dataclass
class Table:
    """A selector that looks its selections up by the instruction's text."""

    selections: Mapping[str, Selection]
    name: str = "table"

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """The selection in the table."""
        return Selected(self.selections[instruction.text])


def random_selection(model: Model, keep: Sequence[int], generator: np.random.Generator) -> Selection:
    """Arbitrary neurons."""
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    ids = [np.sort(generator.permutation(width)[:k]).astype(np.int32) for width, k in zip(widths, keep, strict=True)]
    return Selection(tuple(ids), tuple(widths), "planted")


def plant(model: Model, selections: Mapping[str, Selection], domain: str, seed: int, answer: int = 24) -> list[Example]:
    """One example per selection: a random prompt named by its key, and what the model says to it on that selection."""
    generator = np.random.default_rng(seed)
    examples = []
    for text, selection in selections.items():
        prompt = generator.integers(3, 250, size=int(generator.integers(5, 12))).tolist()
        model.switch(selection)
        said = [int(token) for token, _ in generate_step(mx.array(prompt), model.module, max_tokens=answer)]
        tokens = np.array([*prompt, *said], np.int32)
        examples.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt), text, domain, text))
    return examples


def write_sharp_checkpoint(folder: Path) -> Path:
    """A tiny checkpoint whose FFNs say what comes next: random, but with strong down projections and sharp logits."""
    source = write_source(folder.with_name(f"source-of-{folder.name}"), "llama-untied")
    arrays = load_arrays(source / "model.safetensors")
    scales = {"down_proj": 8, "lm_head": 4}
    changed = {
        name: array * next((scale for part, scale in scales.items() if part in name), 1)
        for name, array in arrays.items()
    }
    mx.eval(changed)
    mx.save_safetensors(str(source / "model.safetensors"), changed, {"format": "mlx"})
    convert(open_source(source), folder, Options())
    return folder


@dataclass(frozen=True)
class Experts:
    """Disjoint groups of neurons of every FFN, of equal size, each with characters of its own.

    In the model that `write_experts_source` makes, the characters of a group carry a direction of the residual stream
    that its neurons, and no others, are gated by: what follows such a character is computed by these neurons alone.

    Attributes:
        neurons: by FFN, by group, sorted ids.
        characters: by group.
    """

    neurons: tuple[tuple[npt.NDArray[np.int32], ...], ...]
    characters: tuple[str, ...]

    def selection(self, groups: Sequence[int]) -> Selection:
        """The neurons of some groups."""
        ids = [np.sort(np.concatenate([layer[group] for group in groups])) for layer in self.neurons]
        return Selection(tuple(ids), (_D_FFN,) * _LAYERS, "planted")


def make_experts(count: int) -> Experts:
    """`count` groups, a power of two up to 16, with neurons and characters drawn by chance."""
    generator = np.random.default_rng(count)
    neurons = tuple(
        tuple(np.sort(ids).astype(np.int32) for ids in np.split(generator.permutation(_D_FFN), count))
        for _ in range(_LAYERS)
    )
    # What the chat template writes belongs to nobody.
    free = sorted(set(printable.strip()) - set("<|user assistant|>"))
    size = len(free) // count
    order = "".join(generator.permutation(free).tolist())
    return Experts(neurons, tuple(order[group * size : (group + 1) * size] for group in range(count)))


def write_experts_source(folder: Path, experts: Experts) -> Path:
    """A dense llama whose FFNs are made of these experts; embeddings, attention and all other weights are random."""
    source = write_source(folder, "llama-untied")
    arrays = load_arrays(source / "model.safetensors")
    generator, count = np.random.default_rng(1), len(experts.characters)
    # The first dimensions of the residual stream say whose character it is, the others which one.
    rest = _D_MODEL - count
    embeddings = generator.normal(size=(_VOCABULARY, _D_MODEL))
    embeddings[:, :count] = 0
    output = np.zeros((_VOCABULARY, _D_MODEL))
    tokenizer = load_tokenizer(source)
    for group, characters in enumerate(experts.characters):
        ids = tokenizer.encode(characters, add_special_tokens=False)
        embeddings[ids, group] = np.sqrt(rest)
        output[ids, group] = 2.5
        output[ids, count:] = 0.5 * generator.normal(size=(len(ids), rest))
    changed = {"model.embed_tokens.weight": embeddings, "lm_head.weight": output}
    for layer, groups in enumerate(experts.neurons):
        gate, up, down = (np.zeros((_D_FFN, _D_MODEL)) for _ in range(3))
        for group, ids in enumerate(groups):
            gate[ids, group] = 1
        up[:, count:] = generator.normal(size=(_D_FFN, rest)) / np.sqrt(rest)
        down[:, count:] = generator.normal(size=(_D_FFN, rest)) * 0.2 / np.sqrt(_D_FFN / count)
        for name, weight in (("gate", gate), ("up", up), ("down", down.T)):
            changed[f"model.layers.{layer}.mlp.{name}_proj.weight"] = weight
    arrays |= {name: mx.array(weight.astype(np.float32)) for name, weight in changed.items()}
    mx.eval(arrays)
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "mlx"})
    return source


def expert_chats(
    model: Model,
    tokenizer: TokenizerWrapper,
    experts: Experts,
    named: Sequence[Sequence[int]],
    domain: str,
    generator: np.random.Generator,
) -> list[Record]:
    """One chat per entry of `named`: the groups whose characters the question is made of.

    The answer speaks of these groups in turn: a character of the group, and what the model says next on the neurons of
    all groups that were named.
    """
    records = []
    for groups in named:
        characters = [list(experts.characters[group]) for group in groups]
        question = "".join(np.concatenate([generator.choice(mine, 12 // len(groups)) for mine in characters]))
        user = {"role": "user", "content": question}
        prompt, said = render_messages(tokenizer, [user]), list[int]()
        model.switch(experts.selection(groups))
        for mine in characters:
            said += tokenizer.encode(str(generator.choice(mine)), add_special_tokens=False)
            tokens = generate_step(mx.array(prompt + said), model.module, max_tokens=18 // len(groups))
            said += [int(token) for token, _ in tokens]
        records.append(Record((user, {"role": "assistant", "content": tokenizer.decode(said)}), domain))
    return records


@dataclass(frozen=True)
class Distilled:
    """A model of experts, and the predictor that the real pipeline distils from its chats.

    Attributes:
        data: chats that the predictor was not fitted on; domain `a` names the first half of the groups, `b` the others.
        keep: as many neurons per FFN as the groups have that a chat names.
    """

    experts: Experts
    model: Model
    predictor: SparsityPredictor
    data: dict[str, list[Example]]
    keep: tuple[int, ...]


def distil_experts(folder: Path, count: int, named: int, *, chats: int, held_out: int) -> Distilled:
    """Convert with a calibrated prior, measure the targets, fit the head, save and load it.

    Args:
        count: of groups.
        named: groups that a chat names.
        chats: to fit on, per domain.
        held_out: chats for `data`, per domain.
    """
    experts, generator = make_experts(count), np.random.default_rng(2)
    source = write_experts_source(folder / "source", experts)
    convert(open_source(source), folder / "writer", Options())
    writer, tokenizer = load(folder / "writer")
    fitted, data = list[Record](), dict[str, list[Example]]()
    for domain, groups in {"a": range(count // 2), "b": range(count // 2, count)}.items():
        drawn = [generator.choice(groups, named, replace=False).tolist() for _ in range(chats + held_out)]
        records = expert_chats(writer, tokenizer, experts, drawn, domain, generator)
        fitted += records[:chats]
        data[domain] = encode_all(tokenizer, records[chats:], 128, print)
    writer.close()
    convert(open_source(source), folder / "checkpoint", Options(calibration=fitted, tolerance=None))
    model, tokenizer = load(folder / "checkpoint")
    targets = measure(
        model, encode_all(tokenizer, fitted, 128, print), folder / "targets", Backbone.first_layers(model, 1)
    )
    (folder / "predictor").mkdir()
    distill(targets, rank=32).head.save(folder / "predictor" / "head.safetensors")
    predictor = load_predictor(folder / "predictor", model.module, tokenizer, model.context_length, (_D_FFN,) * _LAYERS)
    return Distilled(experts, model, predictor, data, model.keep(named / count))
