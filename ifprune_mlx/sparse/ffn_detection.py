"""Finds the FFNs of an mlx-lm model that can be sliced, by structure and not by family name.

An FFN can be sliced where its hidden units are independent of each other: two linear projections of the input (or one
twice as wide), combined unit by unit, and a linear projection back. Which modules look so is a matter of shapes;
whether they are so is tried out, with a handful of units in place of the projections' own outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations

import mlx.core as mx
import numpy as np
from mlx import nn

from ifprune_mlx.checkpoint.ffn_spec import HALVES, INTERLEAVED, FFNSpec, split_fused
from ifprune_mlx.errors import SourceError

# Units of a trial: more than two, so that halves and pairs differ, and no width that a model has.
_UNITS = 5
_STEP = 0.25
_EXPERT = re.compile(r"\bexperts\.\d+\b")


def find_ffns(model: nn.Module, model_type: str) -> list[FFNSpec]:
    """The sliceable FFNs of an mlx-lm model, in the order of its layers.

    Raises:
        SourceError: with the reason, if there is none.
    """
    specs = []
    mixing = set()
    for path, module in model.named_modules():
        if _EXPERT.search(path):  # which tokens it sees is a router's choice; no instruction's
            continue
        for spec in _candidates(path, module):
            verdict = _try_out(module, spec)
            if verdict is _MIXING:
                mixing.add(spec.down)
            if isinstance(verdict, FFNSpec):
                specs.append(verdict)
                break
    # Layers of one make may differ in that (gemma3n: only some have sparse activations); half a model is none.
    if not specs or any(spec.down in mixing for spec in specs):
        raise SourceError(
            f"model type {model_type} cannot be sliced: {_reason(model, bool(mixing))}; use it with mlx-lm itself"
        )
    return sorted(specs, key=lambda spec: [int(part) if part.isdigit() else 0 for part in re.split(r"\.", spec.path)])


def _candidates(path: str, module: nn.Module) -> Iterator[FFNSpec]:
    """What could be an FFN by its shapes."""
    linear = {name: leaf for name, leaf in module.items() if type(leaf) is nn.Linear}
    for down, leaf in linear.items():
        d_model, d_ffn = leaf.weight.shape
        down_bias = "bias" in leaf
        wide = [name for name, other in linear.items() if name != down and other.weight.shape == (2 * d_ffn, d_model)]
        for name in wide:
            yield FFNSpec(path, name, name, down, d_model, d_ffn, "bias" in linear[name], down_bias, HALVES)
        equal = [name for name, other in linear.items() if name != down and other.weight.shape == (d_ffn, d_model)]
        for gate, up in combinations(equal, 2):
            biased = "bias" in linear[gate]
            if biased == ("bias" in linear[up]):
                yield FFNSpec(path, gate, up, down, d_model, d_ffn, biased, down_bias)


class _Stub(nn.Module):
    """Stands in for a projection: gives its output, whatever the input, and keeps the input."""

    def __init__(self, output: mx.array) -> None:
        super().__init__()
        self._output = output
        self.inputs: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.inputs.append(x)
        return self._output


_MIXING = object()


def _try_out(module: nn.Module, spec: FFNSpec) -> FFNSpec | object | None:
    """Run the module with a few made-up units, each nudged in turn, and see which hidden units follow.

    Returns:
        The candidate with what was learned about it (which leaf is the gate, how a common leaf lies); `_MIXING` if
        units depend on each other; None if it is no gated FFN at all.
    """
    units = _UNITS
    start = np.linspace(0.6, 1.4, 2 * units, dtype=np.float32)
    start[[1, 1 + units]] = 3.0  # an outlier, which shows where units are measured against each other (gemma3n)
    # Row 0 is the start; row 1 + i has input i nudged; the last two have the first, then the second half doubled.
    trials = np.concatenate(
        [start[None], start + _STEP * np.eye(2 * units, dtype=np.float32), start[None], start[None]]
    )
    trials[-2, :units] *= 2
    trials[-1, units:] *= 2
    values = mx.array(trials)[:, None]
    if spec.fused:
        stubs = {spec.gate: _Stub(values)}
    else:
        stubs = {spec.gate: _Stub(values[..., :units]), spec.up: _Stub(values[..., units:])}
    down = _Stub(mx.zeros((len(trials), 1, spec.d_model)))
    stubs[spec.down] = down
    kept = {name: module[name] for name in stubs}
    try:
        module.update_modules(stubs)
        module(mx.ones((len(trials), 1, spec.d_model)))
        if any(len(stub.inputs) != 1 for stub in stubs.values()) or down.inputs[0].shape != (len(trials), 1, units):
            return None
        hidden = np.array(down.inputs[0][:, 0].astype(mx.float32))
    except Exception:  # whatever it is, it does not run as an FFN does
        return None
    finally:
        module.update_modules(kept)
    follows = np.abs(hidden[1 : 1 + 2 * units] - hidden[0]) > 1e-5  # [input, hidden unit]
    if (follows.sum(axis=0) > 2).any():
        return _MIXING
    for fused in (HALVES, INTERLEAVED) if spec.fused else (HALVES,):
        first, second = split_fused(mx.arange(2 * units), fused)
        expected = np.zeros_like(follows)
        expected[np.array(first), np.arange(units)] = expected[np.array(second), np.arange(units)] = True
        if (follows == expected).all():
            break
    else:
        return None
    if spec.fused:
        return FFNSpec(**(spec.to_dict() | {"fused": fused}))
    # The hidden units are linear in up; in gate only if the FFN has no activation function.
    linear_in_up = np.allclose(hidden[-1], 2 * hidden[0], rtol=1e-4)
    return spec if linear_in_up else FFNSpec(**(spec.to_dict() | {"gate": spec.up, "up": spec.gate}))


def _reason(model: nn.Module, mixing: bool) -> str:
    if mixing:
        return "its FFN computes each neuron from all of them, so leaving some out changes the others"
    modules = [module for _, module in model.named_modules()]
    from mlx_lm.models.switch_layers import SwitchLinear  # here, since looking at a checkpoint needs no mlx-lm

    routed = any(_EXPERT.search(path) for path, _ in model.named_modules())
    if routed or any(isinstance(module, SwitchLinear) for module in modules):
        return "its FFNs are routed experts only (a pure mixture of experts)"
    for module in modules:
        shapes = [leaf.weight.shape for leaf in module.values() if type(leaf) is nn.Linear]
        if len(shapes) == 2 and shapes[0] == shapes[1][::-1]:
            return "its FFN has two projections and no gate"
    return "it has no FFN of plain linear layers"
