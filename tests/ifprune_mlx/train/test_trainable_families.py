"""Which of the families that can be sliced can be trained, that others are refused at once, and that the gradients are
those of the loss."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.optimizers import Optimizer

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import DataError, Model, PredictorError, load
from ifprune_mlx.data.dataloader import DataMixture
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.selection.predictor import hidden_states
from ifprune_mlx.train.attribution import attribution, midpoint_masks
from ifprune_mlx.train.gradients import check_kernels
from ifprune_mlx.train.lora import LoRAModel
from ifprune_mlx.train.step import Arm, TrainStep
from ifprune_mlx.train.trainable import Parameters
from ifprune_mlx.train.trainer import Trainer
from tests.family_configs import OLD_MLX_LM, cases, write_family
from tests.ifprune_mlx.sparse.test_ffn_detection import SLICED
from tests.ifprune_mlx.train.configs import config
from tests.tiny import write_checkpoint

UNREADABLE = dict.fromkeys(
    ("afm7", "bailing_moe", "exaone", "internlm2", "lille-130m", "openelm", "qwen", "talkie"),
    "does not expose its hidden states",
)
REFUSED = UNREADABLE
if OLD_MLX_LM:
    # It runs falcon_h1's first layer alone, and asks for the gradient of the ids of the experts.
    UNREADABLE |= {"falcon_h1": "runs the first layer alone"}
    routed = ("Klear", "afmoe", "deepseek_v2", "dots1", "exaone_moe", "glm4_moe", "kimi_linear", "lfm2_moe")
    routed += ("longcat_flash", "qwen3_moe", "qwen3_next", "solar_open", "step3p5")
    REFUSED = UNREADABLE | dict.fromkeys(routed, "Cannot calculate VJP with respect to indices")
RECURRENT = ("falcon_h1", "lfm2", "olmo_hybrid", "qwen3_5", "recurrent_gemma")
STEPS = (1e-2, -1e-2)
TOKENS = mx.array([[1, 40, 300, 7, 7, 99, 250, 3]])


def open_family(folder: Path, model_type: str) -> Model:
    write_family(folder / "source", model_type)
    convert(open_source(folder / "source"), folder / "ifp", Options())
    return load(folder / "ifp")[0]


def chat(count: int, seed: int) -> Example:
    tokens = np.random.default_rng(seed).integers(4, 300, count).astype(np.int32)
    return Example(tokens, np.arange(count) >= count // 2, count // 2, "", "a", str(seed))


@pytest.mark.parametrize("model_type", cases(SLICED))
def test_a_family_without_gradients_is_refused_at_once(tmp_path: Path, model_type: str) -> None:
    model = open_family(tmp_path, model_type)
    before = model(TOKENS)
    if model_type in REFUSED:
        with pytest.raises(DataError, match=f"ifp: models of type {model_type} cannot be .*{REFUSED[model_type]}"):
            check_kernels(model)
    else:
        check_kernels(model)
    assert mx.array_equal(model(TOKENS), before)
    assert not any(module.training for _, module in model.module.named_modules())


@pytest.mark.parametrize("model_type", cases(name for name in SLICED if name not in UNREADABLE))
def test_a_predictor_can_read_with_any_number_of_first_layers(tmp_path: Path, model_type: str) -> None:
    """Also where the family asks a layer further behind how far attention reaches."""
    model = open_family(tmp_path, model_type)
    depth = len(model.layers)
    found = [hidden_states(model.module, TOKENS, layers) for layers in range(1, depth + 1)]
    assert all(np.isfinite(np.array(states)).all() for states in found)
    if model_type != "stablelm":  # cannot be called without a cache
        whole = hidden_states(model.module, TOKENS)
        assert float(mx.abs(found[-1] - whole).max()) <= 1e-5 * float(mx.abs(whole).max())
    with pytest.raises(PredictorError, match=f"reads {depth + 1} layers, the model has {depth}"):
        hidden_states(model.module, TOKENS, depth + 1)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("model_type", cases(name for name in RECURRENT if name not in UNREADABLE))
def test_gradients_of_recurrent_families_are_those_of_the_loss(
    tmp_path: Path, model_type: str, grad_checkpoint: bool
) -> None:
    """A small step along the gradient changes the loss by the step times the gradient's norm."""
    model = open_family(tmp_path, model_type)
    tuned, example = LoRAModel(model, rank=2, scale=2.0), chat(12, 1)
    stepper = TrainStep(tuned, None, model.prior, config(teacher=0, grad_checkpoint=grad_checkpoint))

    def run(parameters: Parameters) -> tuple[float, Parameters]:
        arm = Arm("static", parameters, {"adapter": Optimizer()})
        (found,) = stepper.accumulate(arm, [example], [model.keep(0.5)], None, 1, learn_head=False)
        return found.cross_entropy, arm.gradients

    mx.random.seed(3)
    at = {name: array + 0.1 * mx.random.normal(array.shape) for name, array in tuned.initial.items()}
    _, gradients = run(at)
    norm = float(mx.sqrt(sum((mx.square(gradient).sum() for gradient in gradients.values()), mx.array(0.0))))
    further, back = (run({name: a + step / norm * gradients[name] for name, a in at.items()})[0] for step in STEPS)
    assert (further - back) / (STEPS[0] - STEPS[1]) == pytest.approx(norm, rel=1e-2)


class _Kernel(nn.Module):
    """A norm whose kernel has no gradient, QR's; as the fast paths of mlx-lm's families on Metal."""

    def __init__(self, norm: nn.Module, *, spared: bool) -> None:
        super().__init__()
        self.norm, self._spared = norm, spared

    def __call__(self, x: mx.array) -> mx.array:
        normed: mx.array = self.norm(x)
        if self._spared and self.training:
            return normed
        return normed + 0 * mx.linalg.qr(normed, stream=mx.cpu)[0].sum()


@pytest.mark.parametrize("spared", [False, True])
def test_kernels_without_a_gradient_are_left_out_in_training_where_a_family_can(tmp_path: Path, spared: bool) -> None:
    model, _ = load(write_checkpoint(tmp_path / "checkpoint"))
    layer = model.layers[1]
    layer.input_layernorm = _Kernel(layer.input_layernorm, spared=spared)
    model.module.eval()
    if not spared:
        with pytest.raises(DataError, match=r"models of type llama cannot be trained on this device .*QR"):
            check_kernels(model)
        return
    check_kernels(model)
    (found, *_) = attribution(model, [chat(12, 1)], midpoint_masks(model))
    assert found.max() > 0
    mixture = DataMixture({"a": ([chat(12, 1)], 1.0)}, seed=0)
    settings = config(selector=("static",), batch_size=2, iters=3, warmup=0, output=tmp_path / "run")
    run = Trainer(LoRAModel(model, rank=4, scale=2.0), None, model.prior, mixture, settings)
    losses = [run.advance()["arms"]["static"]["a"]["ce"] for _ in range(3)]
    assert losses[2] < losses[0]
