"""Loads an IFP checkpoint as an mlx-lm model whose FFNs can be switched between selections and dense.

The module is mlx-lm's own class with its projection leaves replaced. One operation at a time may use a model
(`ifprune_mlx.model_lock`); a second one raises.
"""

from __future__ import annotations

import logging
import re
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes, load_model

from ifprune_mlx.checkpoint.budget import (
    RAM,
    SSD,
    check_fits,
    choose_residency,
    resolve_keep,
    room,
    spare_slots,
)
from ifprune_mlx.checkpoint.config_check import check_config
from ifprune_mlx.checkpoint.context_length import context_length
from ifprune_mlx.checkpoint.format import Checkpoint, Layout
from ifprune_mlx.checkpoint.hub import resolve
from ifprune_mlx.checkpoint.neuron_reader import RowReader, read_rows
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.device import limits
from ifprune_mlx.errors import BudgetError, CheckpointError, IfpruneError, SelectionError, reason_of
from ifprune_mlx.model_lock import ModelLock, begin_worker
from ifprune_mlx.parallel.ranks import Ranks
from ifprune_mlx.parallel.sharding import deal, shard
from ifprune_mlx.selection.cache import SelectionCache
from ifprune_mlx.selection.predictor import SparsityPredictor, load_predictor
from ifprune_mlx.selection.selection import Scores, Selection
from ifprune_mlx.sparse.down_product import choose
from ifprune_mlx.sparse.ffn import SlicedProjection, replace_leaves
from ifprune_mlx.sparse.quantized import try_products
from ifprune_mlx.sparse.slots import FFNSlots
from ifprune_mlx.tokenizer import embedding_rows, load_tokenizer

_WITHOUT_BFLOAT16 = re.compile(r"Apple M[12]\b")
_NOT_DENSE = (
    "no selection is active: with residency ssd, where not all neurons are in memory, give --selector learned or "
    "static, a task or a selection; a dense model and the activation selector need residency ram"
)

_log = logging.getLogger(__name__)

Value = TypeVar("Value")
Progress = Callable[[int, int], None]
"""Called with (done, total) as long work advances."""


@dataclass(frozen=True)
class Switch:
    """The cost of making a selection active.

    Attributes:
        seconds: wall time; in `ssd` residency reading goes on after it, while the first layers compute.
        neurons: neurons that became active.
        missing: how many of them have to be read from the checkpoint.
        bytes: bytes of weights written, for neurons that enter and for those that move aside in memory.
        overlap: share of the new selection that was active before; None if the model was dense.
    """

    seconds: float
    neurons: int
    missing: int
    bytes: int
    overlap: float | None


class Model:
    """A loaded IFP checkpoint.

    It is callable like an mlx-lm model and has `layers` and `make_cache`, so mlx-lm's functions accept it, or
    `model.module`.

    Any thread may use it, one at a time. `load` and an answer leave only computed arrays behind, since MLX arrays may
    not change threads before. An answer holds the model from its first token to its last: until then `switch`, `close`,
    a call of the model and another answer raise ModelBusyError, in the same thread too, and change nothing.
    `Session.astream` waits instead. MLX's random numbers are seeded per thread (`mx.random.seed`).

    After `close` whatever would need the model raises ModelClosedError.

    Attributes:
        checkpoint: the checkpoint it was loaded from.
        tokenizer: the checkpoint's tokenizer, if `load` made the model.
        selection: the active selection; None while the model is dense.
        selection_cache: selections made before; a new selector of this model uses it. At first in memory only.
        slots: the neurons of every FFN in memory.
        down_leaves: the down projection of every FFN; its observer sees the FFN's hidden activations.
        lock: lets one operation at a time use the model; the module checks it before every call.
        residency: `ram`, or `ssd`: only active neurons are in memory, and the model cannot be dense.
        memory: bytes that the weights may take; None if that was not limited.
        vocabulary: tokens that it has embeddings for; None if its class does not show it.
        ranks: the processes that share it; None if it is whole here. Then all of them make the same calls.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: nn.Module,
        slots: list[FFNSlots],
        down: list[SlicedProjection],
        lock: ModelLock,
        residency: str,
        memory: int | None,
        float_bytes: int | None,
        vocabulary: int | None,
        ranks: Ranks | None,
    ) -> None:
        self.checkpoint = checkpoint
        self._module = module
        self.slots = slots
        self.down_leaves = down
        self.lock = lock
        self.residency = residency
        self.memory = memory
        self.vocabulary = vocabulary
        self.ranks = ranks
        self.tokenizer: TokenizerWrapper | None = None
        self.selection: Selection | None = None
        self.selection_cache = SelectionCache()
        self._float_bytes = float_bytes
        self._reading: ThreadPoolExecutor | None = None
        limits.opened(self)

    @property
    def module(self) -> nn.Module:
        """The mlx-lm model, with sliced leaves."""
        self.lock.check_open()
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Call the mlx-lm model: tokens int `[B, L]` (and `cache=`) -> logits `[B, L, vocabulary]`."""
        logits: mx.array = self.module(*args, **kwargs)
        return logits

    @property
    def layers(self) -> Any:
        """The decoder layers; mlx-lm's cache functions use them."""
        return self.module.layers

    def make_cache(self) -> list[Any]:
        """An empty cache of the family's kind; mlx-lm's `make_prompt_cache` calls this."""
        cache: list[Any] = make_prompt_cache(self.module)
        return cache

    @property
    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return self.checkpoint.config

    @property
    def dtype(self) -> mx.Dtype:
        """Float type of the arrays that are not quantized."""
        arrays: dict[str, mx.array] = dict(tree_flatten(self.layers[0].parameters()))
        return next(array.dtype for array in arrays.values() if mx.issubdtype(array.dtype, mx.floating))

    @property
    def context_length(self) -> int | None:
        """The model's maximum number of tokens, if its config has one."""
        return context_length(self.config)

    @property
    def total_parameters(self) -> int:
        """Parameters of the dense model."""
        return self.checkpoint.parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that take part in a token now."""
        return self.checkpoint.active_parameters(self.selection.keep if self.selection else None)

    @cached_property
    def prior(self) -> list[Scores]:
        """Input-independent importance, per FFN float32 `[d_ffn]`, in the source's neuron order."""
        return self._priors("prior")

    @cached_property
    def down_norms(self) -> list[Scores]:
        """Norm of every neuron's down row, per FFN float32 `[d_ffn]`."""
        return self._priors("down_norm")

    @cached_property
    def predictor(self) -> SparsityPredictor | None:
        """The checkpoint's sparsity predictor, loaded at first use; None if it has none."""
        self.lock.check_open()
        if not self.checkpoint.has_predictor:
            return None
        tokenizer = self.tokenizer or _load_tokenizer(self.checkpoint, False, self.vocabulary)
        widths = [spec.d_ffn for spec in self.checkpoint.layout.ffns]
        folder = self.checkpoint.path / "predictor"
        predictor = load_predictor(folder, self.module, tokenizer, self.context_length, widths)
        mx.eval(predictor.backbone, vars(predictor.head))
        return predictor

    def keep(
        self, density: float | None = None, active_parameters: int | None = None, memory: int | None = None
    ) -> tuple[int, ...]:
        """*k* per FFN under a budget, by default the model's own; see `checkpoint.budget.resolve_keep`."""
        self.lock.check_open()
        return resolve_keep(
            self.checkpoint,
            density=density,
            active_parameters=active_parameters,
            memory=self.memory if memory is None else memory,
            residency=self.residency,
            float_bytes=self._float_bytes,
        )

    def agreed(self, value: Value) -> Value:
        """The value, which must be JSON; of a model that several ranks share, the leader's."""
        return value if self.ranks is None else self.ranks.share(value)

    def check(self, selection: Selection) -> None:
        """Raise SelectionError unless `selection` fits this model's FFNs."""
        self.lock.check_open()
        self.checkpoint.check(selection)

    def switch(self, selection: Selection | None) -> Switch:
        """Make a selection active, or all neurons (None). Moves only the neurons that differ.

        Compute the model's outputs (`mx.eval`) before, or they see the new weights. In `ssd` residency None leaves no
        neuron active, and the model needs a selection before it is called.

        Raises:
            SelectionError: if the selection belongs to a model of another shape.
            BudgetError: in `ssd` residency, if the selection needs more than the model's memory budget.
            ModelBusyError: if an answer is under way.
        """
        start = time.perf_counter()
        with self.lock.held(), nullcontext() if self.ranks is None else self.ranks.together():
            if selection is None:
                for slots in self.slots:
                    slots.activate_all()
                self.selection = None
                return Switch(time.perf_counter() - start, 0, 0, 0, None)
            self.checkpoint.check(selection)
            kept = [slots.own(ids) for slots, ids in zip(self.slots, selection.ids, strict=True)]
            if min(map(len, kept)) == 0:
                raise SelectionError("the selection leaves a rank no neuron of an FFN; use fewer ranks, or keep more")
            overlap = selection.overlap(self.selection) if self.selection else None
            _synchronize()
            spare = self._spare_slots(selection) if self.residency == SSD else 0
            # No selection is active until all layers are done: an exception must not leave a mixture.
            self.selection = None
            for slots in self.slots:
                slots.k = 0
            neurons = missing = written = 0
            # Layer by layer, so that a scatter that copies holds at most one copy of one layer's array.
            for slots, ids in zip(self.slots, kept, strict=True):
                plan = slots.plan(ids, spare)
                neurons += len(plan.leaving)
                missing += len(plan.missing)
                written += plan.rows_written * slots.row_bytes
                if len(plan.missing):
                    # Rows are read in layer order, while earlier layers compute: see `FFNSlots.wait`.
                    slots.pending = self._reader().submit(slots.apply, plan)
                else:
                    slots.apply(plan)
            if self.ranks is not None:
                self._agree_on_rows()
            mx.eval([slots.activate(len(ids)) for slots, ids in zip(self.slots, kept, strict=True)])
            self.selection = selection
            done = Switch(time.perf_counter() - start, neurons, missing, written, overlap)
            _log.debug("switched to selection %s of %s: %s", selection.hash, selection.selector, done)
            return done

    def _agree_on_rows(self) -> None:
        """Wait for all that is read, on every rank: either all of them have the selection's rows, or none uses it."""
        assert self.ranks is not None
        with self.ranks.together():
            for slots in self.slots:
                if slots.pending is not None:
                    slots.pending.result()

    def _spare_slots(self, selection: Selection) -> int:
        """Slots per FFN that the memory budget leaves for inactive neurons. Raises BudgetError if it is exceeded."""
        memory, float_bytes = self.memory, self._float_bytes
        check_fits(self.checkpoint, SSD, selection.keep, memory=memory, float_bytes=float_bytes, asked=True)
        return spare_slots(self.checkpoint, self.memory, selection.keep, self._float_bytes)

    def first_layers_in_order(self, layers: int) -> None:
        """Leave no selection active, and make that many first FFNs dense, in the source's order of neurons.

        In that order their output does not depend on earlier selections, not even in its last digits.

        Raises:
            ModelBusyError: if an answer is under way.
        """
        with self.lock.held():
            self.switch(None)
            _synchronize()
            for slots in self.slots[:layers]:
                slots.restore()

    def _reader(self) -> ThreadPoolExecutor:
        if self._reading is None:
            self._reading = ThreadPoolExecutor(1, "ifprune-read", begin_worker)
        return self._reading

    def close(self) -> None:
        """Free the weights and MLX's cache; the model cannot be used afterwards. A second call does nothing.

        Closing the last open model restores the limits of cache and wired memory that MLX had before the first.

        Raises:
            ModelBusyError: if an answer is under way.
        """
        if self.lock.closed:
            return
        with self.lock.held():
            if self._reading is not None:
                self._reading.shutdown(cancel_futures=True)
            for slots in self.slots:
                slots.close()
            self.slots = []
            self.down_leaves = []
            self._module = nn.Module()
            for made in ("predictor", "prior", "down_norms"):
                self.__dict__.pop(made, None)
            mx.clear_cache()
            _synchronize()  # the wired limit must not change while something is computed
            limits.closed(self)
        self.lock.close()

    def _priors(self, kind: str) -> list[Scores]:
        self.lock.check_open()
        arrays = load_arrays(self.checkpoint.priors_file, CheckpointError)
        priors = [np.array(arrays[f"{kind}.{index}"]) for index in range(len(self.checkpoint.layout.ffns))]
        self.checkpoint.check_unchanged(self.checkpoint.priors_file)
        return priors


def load(
    path_or_repo: str | Path | Checkpoint | None = None,
    *,
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
    residency: str | None = None,
    memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Load an IFP checkpoint and its tokenizer, as `mlx_lm.load` does a plain one. The model starts dense.

    Args:
        path_or_repo: folder, hub id, or an opened checkpoint. None takes the embedded SmolLM2-135M-Instruct, which is
            fetched and converted at first use; the log says so.
        dtype: float type to cast the weights to; None keeps the checkpoint's, or takes `default_dtype`.
        residency: `ram` keeps every neuron in memory, `ssd` only the active ones; None takes `ssd` only if `memory`
            requires it.
        memory: bytes that the weights may take. In `ssd` residency the rest holds the neurons selected most often.
        trust_remote_code: let the tokenizer run code that comes with the checkpoint.
        progress: called with (FFNs loaded, FFNs).
        ranks: share the model with these; see `ifprune_mlx.parallel.ranks.join`.

    Raises:
        CheckpointError: if the checkpoint is damaged or not one, naming the file and what to do.
        SourceError: if the embedded model cannot be fetched.
        BudgetError: if the weights that stay in memory at any density exceed what the GPU may use, or `memory`; the
            message ends in a command that fits. What a density needs is checked when it is used.
    """
    if path_or_repo is None:
        # By name, since nothing here may depend on the converter, which stands above.
        path_or_repo = import_module("ifprune_convert.embedded").ensure_embedded(_log.warning)
    checkpoint = (
        path_or_repo
        if isinstance(path_or_repo, Checkpoint)
        else Checkpoint.open(resolve(path_or_repo, revision, residency=residency, memory=memory))
    )
    if ranks is not None:
        checkpoint = replace(checkpoint, ranks=ranks.size)
    if dtype is None and (dtype := default_dtype(checkpoint)) is not None:
        _say_default_dtype()
    residency = choose_residency(checkpoint, residency, memory, None if dtype is None else dtype.size)
    memory = None if memory is None else room(memory)
    model = load_checkpoint(checkpoint, dtype=dtype, residency=residency, memory=memory, progress=progress, ranks=ranks)
    try:
        model.tokenizer = tokenizer = _load_tokenizer(checkpoint, trust_remote_code, model.vocabulary)
    except CheckpointError:
        model.close()
        raise
    _log.debug("loaded %s (%s, residency %s)", checkpoint.path, checkpoint.id, residency)
    return model, tokenizer


def default_dtype(checkpoint: Checkpoint) -> mx.Dtype | None:
    """float16 for bfloat16 weights on an M1 or M2, whose GPUs emulate bfloat16; None keeps the checkpoint's type.

    Gemma's activations exceed float16's range, so that its models keep bfloat16.
    """
    chip = str(mx.device_info().get("device_name", ""))
    family = str(checkpoint.config.get("model_type", ""))
    emulated = _WITHOUT_BFLOAT16.match(chip) is not None and own_dtype(checkpoint) is not None
    return mx.float16 if emulated and not family.startswith("gemma") else None


def own_dtype(checkpoint: Checkpoint) -> mx.Dtype | None:
    """What `load` has to be given so that it keeps the checkpoint's float type on every chip."""
    return mx.bfloat16 if checkpoint.float_types == {"BF16"} else None


@cache
def _say_default_dtype() -> None:
    _log.warning("float16 instead of the checkpoint's bfloat16, which this chip emulates; --dtype bfloat16 keeps it")


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: mx.Dtype | None = None,
    residency: str = RAM,
    memory: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Model:
    """Load an opened checkpoint's model, without its tokenizer. See `load`."""
    try_products(checkpoint, dtype)  # before there are weights, so that it does not show in the peak of memory
    slots: list[FFNSlots] = []
    ffns = checkpoint.layout.ffns
    choose(checkpoint, dtype)  # before the weights are in memory, which the trial's would add to
    shares = [None] * len(ffns) if ranks is None else deal(checkpoint, ranks.rank, ranks.size)
    for index, share in enumerate(shares):
        # A predictor that reads with the model's first layers needs all of their neurons.
        if residency == RAM or index < checkpoint.predictor_layers:
            if share is None:
                slots.append(FFNSlots(*read_rows(checkpoint, index, dtype)))
            else:
                reader = RowReader(checkpoint, index, dtype, share)
                slots.append(FFNSlots(reader.read_all(), reader.down_bias, share=share))
        else:
            reader = RowReader(checkpoint, index, dtype, share)
            slots.append(FFNSlots(None, reader.down_bias, reader, share))
        if progress is not None:
            progress(index + 1, len(ffns))
    leaves: list[SlicedProjection] = []
    lock = ModelLock()
    module = _load_module(checkpoint, slots, leaves, lock, lazy=ranks is not None)
    vocabulary = embedding_rows(module)
    if ranks is not None:
        shard(module, checkpoint, ranks.group)
    if dtype is not None:
        floats = (mx.float32, mx.float16, mx.bfloat16)
        may_cast = getattr(module, "cast_predicate", lambda _: True)

        def cast(name: str, array: mx.array) -> mx.array:
            return array.astype(dtype) if array.dtype in floats and may_cast(name) else array

        module.update(tree_map_with_path(cast, module.parameters()))
    # The whole module: rope tables are not parameters, and another thread could not compute them later.
    mx.eval(module)
    float_bytes = None if dtype is None else dtype.size
    return Model(checkpoint, module, slots, leaves, lock, residency, memory, float_bytes, vocabulary, ranks)


def _synchronize() -> None:
    """Wait for the streams on which mlx-lm computes answers."""
    mx.synchronize()
    mx.synchronize(generation_stream)


def _load_module(
    checkpoint: Checkpoint, slots: Sequence[FFNSlots], leaves: list[SlicedProjection], lock: ModelLock, *, lazy: bool
) -> nn.Module:
    """The module; `lazy`: for several ranks, with weights that are not read yet."""
    layout: Layout = checkpoint.layout

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        base, arguments = _get_classes(config)
        check_config(config, arguments, checkpoint.path, CheckpointError)

        class Sliced(base):  # type: ignore[misc, valid-type]
            """The family's own class; its projections are replaced before any weight is loaded."""

            def __init__(self, args: Any) -> None:
                nn.Module.__init__(self)  # recurrent_gemma's class does not call it
                super().__init__(args)
                self._last: Callable[[], mx.array | None] = lambda: None
                for spec, ffn_slots in zip(layout.ffns, slots, strict=True):
                    leaves.append(replace_leaves(self, spec, ffn_slots, layout.gate_up, layout.down))

            @wraps(base.__call__)  # mlx-lm looks at the signature
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                lock.check()
                if any(entry.k == 0 for entry in slots):
                    raise BudgetError(_NOT_DENSE)
                if not lazy:
                    return super().__call__(*args, **kwargs)
                if (earlier := self._last()) is not None:
                    # Ranks sum in the same order only if the sums of one call come before those of the next.
                    mx.async_eval(earlier)  # type: ignore[no-untyped-call]
                output = super().__call__(*args, **kwargs)
                self._last = weakref.ref(output)
                return output

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                """The weights unchanged: the family's own `sanitize` ran when the checkpoint was converted."""
                # It still runs for its effect on the model, such as dropping a tied output layer. It may fail over the
                # weights of FFNs, which are not here; that does not matter.
                with suppress(Exception):
                    super().sanitize({name: mx.zeros(array.shape, array.dtype) for name, array in weights.items()})
                return weights

        return Sliced, arguments

    try:
        module, _ = load_model(checkpoint.path, lazy, get_model_classes=classes)
        for name in checkpoint.headers:
            checkpoint.check_unchanged(checkpoint.path / name)
    except IfpruneError:
        raise
    except Exception as exc:  # a wrong config can fail anywhere inside the family's class
        if "alloc" in str(exc).lower():  # out of memory is no fault of the files
            raise
        raise CheckpointError(
            f"{checkpoint.path}: mlx-lm cannot build the model ({reason_of(exc)}); its files do not belong together, "
            "convert the source again"
        ) from exc
    return module


def _load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool, rows: int | None) -> TokenizerWrapper:
    return load_tokenizer(
        checkpoint.path,
        CheckpointError,
        "convert the source again",
        rows=rows,
        eos_token_ids=checkpoint.config.get("eos_token_id"),
        trust_remote_code=trust_remote_code,
    )
