"""What each stage takes of memory and disk at most, by the shapes of the model, before any of it is read.

It counts arrays: those that stay for the whole stage, and the most that are there beside them at one time. Which these
are stands with each stage. `scripts/adapt_table.py` measures the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from mlx import nn

from ifprune_convert.memory_check import converted_bytes
from ifprune_convert.packing import bits_per_weight, plan
from ifprune_convert.pipeline import Options
from ifprune_convert.skeleton import build_skeleton
from ifprune_convert.source import Source
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.sparse.ffn_detection import find_ffns
from ifprune_mlx.tokenizer import embedding_rows

from .config import Stage, read_layers

PROGRAM = 90_000_000
"""Bytes of Python and its libraries."""
HEAD_RANK, LORA_RANK = 64, 16
_DENSITY, _MARGIN = 0.5, 0.25  # the highest that is trained, and what a learning head sees beyond it
_BATCH, _PREFILL = 32, 8  # sequences that are answered together, and that are read together
_KV_STEP = 256  # tokens by which a cache grows
_CHAT = 512  # most tokens of a chat of the first prior
_PIECE = 64  # of them that are read at once
_TRIAL = 2 * 4 << 23  # bytes: how rows are moved in place is tried at the first switch (`sparse.inplace`)
_FLOAT = 4  # bytes of what is trained, and of logits


@dataclass(frozen=True)
class Need:
    """Of one stage.

    Attributes:
        memory: bytes at its peak, the program included.
        disk: bytes of the folder of stages at its peak, and of what it writes elsewhere.
    """

    memory: int
    disk: int


@dataclass(frozen=True)
class Shapes:
    """What the estimate needs to know of a model once it is converted.

    Attributes:
        weights: bytes of all of them.
        ffns: bytes of those of sliced FFNs.
        size: bytes of an activation.
        read: bytes of a weight as the source hands it out, and as it is cast.
        widths: `d_model` and `d_ffn` of every FFN.
        linears: inputs and outputs of the linear layers that get adapters.
        kv: widths of keys and values, over all layers.
        heads: that attend, of a layer.
        layers: how many.
        vocabulary: words that there are logits for.
        largest: weights of the largest tensor outside of FFNs.
    """

    weights: int
    ffns: int
    size: int
    read: int
    widths: tuple[tuple[int, int], ...]
    linears: tuple[tuple[int, int], ...]
    kv: int
    heads: int
    layers: int
    vocabulary: int
    largest: int

    @classmethod
    def of(cls, source: Source, options: Options) -> Shapes:
        """Of what `convert` will make of a source."""
        config = source.config
        skeleton = build_skeleton(source.path, config, len(source.shapes))
        specs = find_ffns(skeleton, str(config["model_type"]))
        packing = plan(source, skeleton, specs, options.quantization, options.float_down)
        whole = config.get("dtype", config.get("torch_dtype")) == "float32" and not source.dequantizes
        size = options.dtype.size if options.dtype is not None else 4 if whole else 2
        plain = 8 * size
        gate_up, down = (_bits(packing.gate_up, plain), _bits(packing.down, plain))
        neurons = sum(spec.d_model * spec.d_ffn for spec in specs)
        layers: Sequence[nn.Module] = skeleton.layers
        linears = [
            [
                (name, *reversed(leaf.weight.shape))
                for name, leaf in layer.named_modules()
                if isinstance(leaf, nn.Linear)
            ]
            for layer in layers
        ]
        healed = linears[min(read_layers(len(layers)), len(layers) - 1) :]
        # A family that computes keys and values otherwise is taken to have as many of them as hidden values.
        kv = sum(outputs for name, _, outputs in chain(*linears) if name.endswith(("k_proj", "v_proj")))
        sliced = {f"{spec.path}.{leaf}.weight" for spec in specs for leaf in spec.leaves}
        return cls(
            weights=converted_bytes(source, options, specs, packing),
            ffns=int(neurons * (2 * gate_up + down) / 8),
            size=size,
            read=size + (4 if source.dequantizes or whole else 2 if options.dtype is not None else 0),
            widths=tuple((spec.d_model, spec.d_ffn) for spec in specs),
            linears=tuple((inputs, outputs) for _, inputs, outputs in chain(*healed)),
            kv=kv or 2 * len(layers) * max(spec.d_model for spec in specs),
            heads=int(config.get("num_attention_heads") or 1),
            layers=len(layers),
            vocabulary=embedding_rows(skeleton) or 0,
            largest=max(math.prod(shape) for name, shape in source.shapes.items() if name not in sliced),
        )

    @property
    def neurons(self) -> int:
        """Of all FFNs."""
        return sum(hidden for _, hidden in self.widths)

    @property
    def widest(self) -> int:
        """Neurons of the largest FFN."""
        return max(hidden for _, hidden in self.widths)

    @property
    def width(self) -> int:
        """Of hidden states."""
        return max(width for width, _ in self.widths)

    @property
    def head(self) -> int:
        """Bytes of a predictor's head, which reads two hidden states."""
        return _FLOAT * (HEAD_RANK * (self.neurons + 2 * self.width) + self.neurons)

    @property
    def adapter(self) -> int:
        """Bytes of an adapter."""
        return _FLOAT * LORA_RANK * sum(map(sum, self.linears))

    def logits(self, tokens: int) -> int:
        """Bytes of logits."""
        return _FLOAT * tokens * self.vocabulary

    def activations(self, tokens: int, share: float) -> int:
        """Bytes that the backward pass of one chat keeps, if FFNs compute this share of their neurons.

        Of an FFN gate, up, their product, and that times the mask; of attention its inputs and outputs, keys and values
        before and after their turn, and how much each token attends to each.
        """
        in_ffns = 4 * share * self.neurons
        in_attention = self.layers * (8 * self.width + self.heads * tokens) + 2 * self.kv
        return int(tokens * self.size * (in_ffns + in_attention))

    def reading(self, tokens: int) -> int:
        """Bytes of the widest layer's activations, where none is kept for later ones."""
        return tokens * self.size * (3 * self.widest + 4 * self.width)


def needs(shapes: Shapes, length: int, chats: int) -> Mapping[Stage, Need]:
    """What stages take.

    Args:
        length: most tokens of a chat.
        chats: that `calibrate` measures.
    """
    disk = _disk(shapes, chats)
    return {stage: Need(PROGRAM + size, disk[stage]) for stage, size in _memory(shapes, length, chats).items()}


def _memory(shapes: Shapes, length: int, chats: int) -> dict[Stage, int]:
    """Bytes of arrays at the peak of each stage."""
    weights, head, adapter = shapes.weights, shapes.head, shapes.adapter
    targets = 2 * chats * shapes.neurons  # float16
    of_one_ffn = 3 * _FLOAT * chats * shapes.widest  # their logarithms, centred
    # The rows of the neurons that a chat runs on are copied, and kept for the backward pass. A learning head computes
    # some more than are chosen.
    share = min(_DENSITY * (1 + _MARGIN), 1.0)
    chosen = int(share * shapes.ffns)
    # Logits, logarithms, products with the teacher's, and the gradients of these; and the teacher's probabilities.
    losses = 6 * shapes.logits(length)
    # The predictor's own head, the one that is trained, its moments, and gradients before and after their sum.
    learning = 6 * head
    on_one_chat = chosen + shapes.activations(length, share) + losses + learning
    # Of two arms weights, moments and gradients; first values and zeros; and a new gradient with its rows.
    adapting = 12 * adapter + _cast(shapes, length)
    # The regression's features, twice the width, in float64: they, their singular vectors and LAPACK's copies; what all
    # chats have in common, in the basis of these vectors.
    features, inner = 2 * shapes.width, min(chats, 2 * shapes.width)
    regression = 8 * (2 * features * (chats + inner) + 4 * chats * inner + 3 * inner**2)
    return {
        # Converting comes first, then chats are read.
        "convert": max(_moving(shapes), weights + _reading_chats(shapes)),
        "answers": weights + _answering(shapes, length),
        # The gradient of a mask for each neuron and token; or, in the end, what all chats gave.
        "calibrate": weights
        + max(
            shapes.activations(length, 1.0) + _FLOAT * length * shapes.neurons + 3 * shapes.logits(length),
            targets + of_one_ffn,
        ),
        "distill": weights + targets + max(regression, 4 * HEAD_RANK * _FLOAT * shapes.neurons) + of_one_ffn,
        # A step has no activations any more, but a head's old and new weights, moments and gradients.
        "select": weights + max(on_one_chat, 9 * head),
        "heal": weights + max(on_one_chat + adapting, 9 * head + 14 * adapter),
        # Converting what was trained, then measuring it.
        "evaluate": max(
            _moving(shapes) + adapter + head,
            weights + head + max(5 * shapes.logits(length) + _reading_chats(shapes), _TRIAL),
        ),
    }


def _disk(shapes: Shapes, chats: int) -> dict[Stage, int]:
    """Bytes on the disk at the end of each stage, and of the file that replaces another."""
    base = shapes.weights
    measured = base + 2 * chats * shapes.neurons
    distilled = measured + shapes.head
    # A run's state has weights and moments; beside it lie the weights alone.
    selecting, healing = 3 * shapes.head, 3 * (shapes.head + 2 * shapes.adapter)
    selected = distilled + selecting + shapes.head
    healed = selected + healing + shapes.head + 2 * shapes.adapter
    result = shapes.weights + shapes.head
    return {
        "convert": base,
        "answers": base,
        "calibrate": measured,
        "distill": distilled,
        "select": selected + selecting,
        "heal": healed + healing,
        "evaluate": healed + 3 * result,  # of both arms, and in its place
    }


def _moving(shapes: Shapes) -> int:
    """Bytes while weights are moved: an FFN's gate and up, both side by side, down and its transpose; or the largest
    tensor as it was and as it is, and a shard."""
    ffn = max(width * hidden for width, hidden in shapes.widths)
    return max(6 * ffn * shapes.size, shapes.largest * (shapes.read or shapes.size) + shapes.largest * shapes.size // 3)


def _reading_chats(shapes: Shapes) -> int:
    """Bytes while a chat is read, a piece after the other."""
    ffn = shapes.ffns // len(shapes.widths)  # one is read twice when weights are loaded
    return max(ffn, shapes.size * _CHAT * shapes.kv + shapes.reading(_PIECE) + 2 * shapes.logits(_PIECE))


def _answering(shapes: Shapes, length: int) -> int:
    """Bytes while a batch is answered: its cache, which is copied when sequences leave it."""
    tokens = -(-(length + 8) // _KV_STEP) * _KV_STEP
    cache = _BATCH * tokens * shapes.kv * shapes.size
    return 2 * cache + 6 * shapes.logits(_BATCH) + shapes.reading(_PREFILL * length)


def _cast(shapes: Shapes, length: int) -> int:
    """Bytes of the inputs that adapters, which are float32, multiply, where the model's are of another type."""
    if shapes.size == _FLOAT:
        return 0
    return _FLOAT * length * sum(inputs for inputs, _ in shapes.linears)


def _bits(packing: Quantization | None, plain: int) -> float:
    return plain if packing is None else bits_per_weight(packing)
