"""Converts a dense checkpoint into an IFP checkpoint, one FFN at a time, atomically.

Everything is written to a hidden folder beside the output and renamed at the end, after the result has been opened as a
user would open it. Peak memory is the size of the largest tensor or FFN, not of the model.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_mlx.chat_sandbox import TemplateLimitError
from ifprune_mlx.checkpoint.atomic_write import check_free, foreign_files, new_folder
from ifprune_mlx.checkpoint.budget import keep_count
from ifprune_mlx.checkpoint.density_curve import TOLERANCE, check_tolerance
from ifprune_mlx.checkpoint.ffn_spec import FFNSpec
from ifprune_mlx.checkpoint.format import MANIFEST, Checkpoint, Layout, Quantization
from ifprune_mlx.checkpoint.format_writer import change_section, write_config, write_manifest
from ifprune_mlx.checkpoint.hub import hub_name
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.tokenize import encode_all
from ifprune_mlx.errors import BudgetError, DataError, IfpruneError, PromptError, SourceError
from ifprune_mlx.eval.density_curve import LEAST_PROMPTS, measure_curve
from ifprune_mlx.model import load, load_checkpoint
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.sparse.ffn_detection import find_ffns
from ifprune_mlx.tokenizer import embedding_rows, load_tokenizer, render_chat, tokens_beyond

from .adapter import open_adapter
from .calibrate import hold_out, measure_prior, read_examples, read_prior
from .card import CARD, write_card
from .frequency import order_by_frequency
from .memory_check import check_calibration
from .packing import Packing, bits_per_weight, plan
from .predictor import open_predictor
from .readers import open_source
from .readers.chat_templates import keep_used_templates
from .readers.hub import locate_source
from .share import CheckNeurons, upload_predictor
from .skeleton import build_skeleton, listing
from .source import Source
from .tokenizer_trial import try_tokenizer
from .upload import check_upload, upload
from .weight_writer import WeightWriter

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total): stage `download` counts bytes, `convert` weights of the source, `calibrate` and
`measure` tokens, `order` chats."""
Note = Callable[[str], None]
"""Called with a line for the user."""

# The lowest of 0.7, 0.8, 0.85 and 0.9 at which the training-free selector stayed fluent on SmolLM2 (docs/log.md).
DEFAULT_DENSITY = 0.9
CURVE_SECONDS = 120.0
"""What measuring the densities may take, where more than the fewest prompts are measured."""
CURVE_TOKENS = 256
"""Of a chat, when densities are measured."""
_SLOW_WEIGHTS = 50_000_000


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        quantization: for FFN rows and, as mlx-lm does it, for every other layer that can be; None keeps the source's
            floats, or the packed bytes of a quantized mlx-lm model (all but the down projections).
        float_down: keep the down projections of a quantized model as floats instead of packing them anew at 8 bits.
        dtype: float type to cast to; None keeps the source's, but quantized GGUF tensors become float16.
        density: the checkpoint's default density; None is the lowest that loses at most `tolerance`, where that is
            measured, else `DEFAULT_DENSITY`.
        tolerance: nats per answer token. With chats to calibrate on, some are held out, and conversion ends with
            measuring what each density loses on them. None measures nothing.
        adapter: folder of an adapter, of mlx-lm or PEFT, to fuse into the weights.
        predictor: folder of a trained sparsity predictor to put in, ours or one in the layout of the authors' code.
        predictor_bits: bits to pack its head's second layer with, 8 or 4; None leaves it as it is.
        check_neurons: is asked whether the model is the one that the predictor was trained for.
        calibration: chats, or their file, to measure the prior on; None takes it from the weights, or from `prior`.
        prior: ready importance per FFN, float32 `[d_ffn]` each, or the safetensors file that holds it.
        order: chats, or their file, by whose selections to put the neurons in order of frequency, for residency `ssd`;
            None keeps the source's order.
        overwrite: replace an existing output folder.
        revision: branch, tag or commit of a source on the hub; None is its main branch.
        trust_remote_code: changes only the message that refuses a source with its own Python code.
        upload_repo: new or empty repository of the hub, `OWNER/NAME`, to upload the checkpoint to.
        upload_predictor: another one, to upload predictor, adapter and prior to, without the weights.
    """

    quantization: Quantization | None = None
    float_down: bool = False
    dtype: mx.Dtype | None = None
    density: float | None = None
    tolerance: float | None = TOLERANCE
    adapter: Path | None = None
    predictor: Path | None = None
    predictor_bits: int | None = None
    check_neurons: CheckNeurons = lambda index, norms: None
    calibration: list[Record] | Path | None = None
    prior: list[Scores] | Path | None = None
    order: list[Record] | Path | None = None
    overwrite: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    upload_repo: str | None = None
    upload_predictor: str | None = None

    @property
    def bits(self) -> float | None:
        """Bits that a weight takes once converted, group scales and biases included; None if it stays as it is."""
        if self.quantization is not None:
            return bits_per_weight(self.quantization)
        return None if self.dtype is None else 8.0 * self.dtype.size


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    checkpoint: Checkpoint
    seconds: float  # without download and upload
    page: str | None = None  # the uploaded checkpoint's page

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        quantization = self.checkpoint.layout.gate_up or self.checkpoint.layout.down
        return {
            "path": str(self.checkpoint.path),
            "bytes": self.checkpoint.disk_bytes,
            "seconds": self.seconds,
            "ffns": len(self.checkpoint.layout.ffns),
            "parameters": self.checkpoint.parameters,
            "quantization": None if quantization is None else quantization.to_dict(),
            "density": self.checkpoint.layout.density,
            "selector": self.checkpoint.default_selector,
        } | ({} if self.page is None else {"uploaded": self.page})


def convert(
    source: Source | str | Path,
    out: str | Path,
    options: Options,
    report: Report = lambda stage, done, total: None,
    note: Note = lambda line: None,
    *,
    unfinished: Path | None = None,
) -> Conversion:
    """Write the IFP checkpoint `out`.

    Args:
        source: an opened source; or a GGUF file, a folder of safetensors or a model of the hub (`ORG/NAME`, or
            `ORG/NAME:FILE.gguf`), which is downloaded first.
        unfinished: where Ctrl-C while chats are read leaves the converted model, and where a call with the same source
            and options takes it from; beside `out`.

    Raises:
        IfpruneError: naming what cannot be used or written; `out` is then as it was.
    """
    out = Path(out)
    if options.density is not None:
        keep_count(options.density, 64)
    if options.tolerance is not None:
        check_tolerance(options.tolerance)
    calibration, order = _examples(options.calibration), _examples(options.order)
    check_output(out, options.overwrite)
    _check_uploads(options)
    if isinstance(source, str | Path):
        path = locate_source(
            str(source),
            options.revision,
            out=out,
            bits=options.bits,
            trust_remote_code=options.trust_remote_code,
            progress=partial(report, "download"),
        )
        source = open_source(path, trust_remote_code=options.trust_remote_code)
    _advise(source, options, note)
    start = time.perf_counter()
    skeleton = build_skeleton(source.path, source.config, len(source.shapes))
    specs = find_ffns(skeleton, str(source.config["model_type"]))
    widths = [spec.d_ffn for spec in specs]
    packing = plan(source, skeleton, specs, options.quantization, options.float_down)
    check_calibration(source, out, options, specs, packing)
    write_predictor = None
    if options.predictor is not None:
        write_predictor = open_predictor(options.predictor, widths, options.predictor_bits)
    prior, method = _ready_prior(options.prior, widths)
    adapter = None if options.adapter is None else open_adapter(options.adapter, skeleton, source.shapes)
    with new_folder(out, overwrite=options.overwrite, error=SourceError) as folder:
        if not _take_over(unfinished, folder):
            # These are quick and can fail, so they come before the long work.
            _write_config(folder, source, options, specs, packing)
            _write_tokenizer(folder, source, embedding_rows(skeleton), (calibration or [])[:1], note)
            if write_predictor is not None:
                write_predictor(folder / "predictor")
                del write_predictor  # its head can be as large as an FFN, and would stay in memory
            writer = WeightWriter(source, skeleton, adapter, folder, options, packing, report)
            norms = [writer.write_ffn(index, spec, len(specs)) for index, spec in enumerate(specs)]
            writer.write_rest()
            _write_priors(folder, prior or [product for product, _ in norms], [down for _, down in norms], method)
        finish = partial(write_manifest, folder, source=_origin(source, options), licence=source.licence)
        # These steps need a checkpoint that opens, so it gets a manifest before its files are final and hashed.
        if calibration is not None:
            with _kept_if_stopped(folder, unfinished):
                _calibrate(folder, options, calibration, partial(finish, hashed=False), report, note)
        if order is not None:
            finish(hashed=False)
            order_by_frequency(folder, order, partial(report, "order"))
        finish()
        write_card(Checkpoint.open(folder), out.absolute().name)
        if options.overwrite:  # it has been hours, maybe
            check_output(out, True)
    checkpoint, seconds = Checkpoint.open(out), time.perf_counter() - start
    return Conversion(checkpoint, seconds, _upload(checkpoint, options, note))


@contextmanager
def _kept_if_stopped(folder: Path, unfinished: Path | None) -> Iterator[None]:
    """Ctrl-C moves the folder there."""
    try:
        yield
    except KeyboardInterrupt:
        if unfinished is not None:
            folder.rename(unfinished)
        raise


def _take_over(unfinished: Path | None, folder: Path) -> bool:
    """Put an unfinished checkpoint in the place of the empty folder, if there is one that opens."""
    if unfinished is None or not unfinished.is_dir():
        return False
    try:
        Checkpoint.open(unfinished)
    except IfpruneError:  # Ctrl-C came while a file was written
        shutil.rmtree(unfinished)
        return False
    unfinished.rename(folder)  # which is empty
    return True


def _check_uploads(options: Options) -> None:
    """Ask the hub, before the long work, whether what is to be uploaded may be."""
    if options.upload_predictor is not None and options.predictor is None:
        raise SourceError("--upload-predictor needs --predictor as well, the trained predictor")
    for name in filter(None, (options.upload_repo, options.upload_predictor)):
        check_upload(name)


def _upload(checkpoint: Checkpoint, options: Options, note: Note) -> str | None:
    """Upload what is asked for; returns the page of the checkpoint."""
    if options.upload_predictor is not None:
        note(f"uploading the predictor to {options.upload_predictor}")
        note(f"uploaded to {upload_predictor(checkpoint, options.adapter, options.upload_predictor)}")
    if options.upload_repo is None:
        return None
    note(f"uploading {checkpoint.path} ({checkpoint.disk_bytes / 1e6:.0f} MB) to {options.upload_repo}")
    return upload(checkpoint, options.upload_repo)


def _calibrate(
    folder: Path,
    options: Options,
    chats: list[Record],
    finish: Callable[[], None],
    report: Report,
    note: Note,
) -> None:
    """Measure the prior on chats, and what each density loses on those held out; `finish` writes a manifest."""
    fitted, held_out = (chats, []) if options.tolerance is None else hold_out(chats)
    finish()
    checkpoint = Checkpoint.open(folder)
    written = load_arrays(checkpoint.priors_file)
    down_norms = [np.array(written[f"down_norm.{index}"]) for index in range(len(checkpoint.layout.ffns))]
    model = load_checkpoint(checkpoint)
    prior = measure_prior(model, folder, fitted, partial(report, "calibrate"))
    model.close()
    _write_priors(folder, prior, down_norms, "calibrated")
    if options.tolerance is not None:
        finish()
        _measure_curve(folder, options, held_out, report, note)


def _measure_curve(folder: Path, options: Options, held_out: list[Record], report: Report, note: Note) -> None:
    """Measure what each density loses, and put that and the defaults that follow from it into the config."""
    assert options.tolerance is not None
    density = DEFAULT_DENSITY if options.density is None else options.density
    try:
        if not held_out:
            raise DataError(f"of the chats a fifth is held out, and that has to be {LEAST_PROMPTS}; give more")
        model, tokenizer = load(folder)
        try:
            # Few tokens of each: the time is better spent on more prompts.
            examples = encode_all(tokenizer, held_out, CURVE_TOKENS, note)
            curve = measure_curve(
                model, examples, seconds=CURVE_SECONDS, note=note, progress=partial(report, "measure")
            )
        finally:
            model.close()
    except (BudgetError, DataError) as exc:
        if options.density is None:
            note(f"what each density loses was not measured ({exc}); the default density is {density:g}")
        return
    selector = curve.best(density).selector
    if options.density is None:
        density, selector = curve.choose(options.tolerance)
    change_section(folder, replace(model.checkpoint.layout, density=density, selector=selector, curve=curve))


def _examples(given: list[Record] | Path | None) -> list[Record] | None:
    return read_examples(given) if isinstance(given, Path) else given


def _ready_prior(prior: list[Scores] | Path | None, widths: list[int]) -> tuple[list[Scores] | None, str]:
    """The given prior, or None, and the method to record; calibration changes both later."""
    if isinstance(prior, Path):
        return read_prior(prior, widths)
    if prior is not None and [len(values) for values in prior] != widths:
        raise SourceError("the ready prior was measured on a model of another shape")
    return prior, "weights" if prior is None else "calibrated"


def _advise(source: Source, options: Options, note: Note) -> None:
    """Say what is odd about the source, and suggest better options for it."""
    for line in source.notes:
        note(line)
    if options.calibration is None and options.prior is None and options.predictor is None:
        note(
            "without --calibrate, which neurons matter is guessed from the weights, and for some families (Gemma 3) "
            "that is no better than chance"
        )
    full = options.quantization is None and options.dtype is not None and options.dtype == mx.float32
    slow = mx.default_device() == mx.cpu and not full
    weights = sum(math.prod(shape) for shape in source.shapes.values())
    if options.calibration is not None and slow and weights > _SLOW_WEIGHTS:
        note("calibrating on a CPU is slow at half precision and quantized; --dtype float32 without -q is quicker")


def _origin(source: Source, options: Options) -> str:
    """The source as the manifest names it."""
    origin = source.path.name
    if (repository := hub_name(source.path)) is not None:
        origin = repository if source.path.is_dir() else f"{repository} {origin}"
    return origin if options.adapter is None else f"{origin} + adapter {options.adapter.absolute().name}"


def check_output(out: Path, overwrite: bool) -> None:
    """Raise SourceError if `out` must not be replaced: only a whole checkpoint, and nothing beside it, may be."""
    check_free(out, overwrite, SourceError)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    elsewhere = "choose another folder, or remove this one first"
    try:
        checkpoint = Checkpoint.open(out)
    except IfpruneError as exc:
        raise SourceError(
            f"{out}: is not an IFP checkpoint, or not a whole one, so --overwrite does not replace it; {elsewhere}"
        ) from exc
    if foreign := foreign_files(out, [*checkpoint.manifest["files"], MANIFEST, CARD]):
        raise SourceError(
            f"{out}: holds {listing(foreign)} beside the checkpoint, so --overwrite does not replace it; {elsewhere}"
        )


def _write_config(folder: Path, source: Source, options: Options, specs: list[FFNSpec], packing: Packing) -> None:
    config = {name: value for name, value in source.config.items() if not name.startswith("quantization")}
    if packing.section is not None:
        config["quantization"] = packing.section
    selector = "learned" if options.predictor is not None else "activation"
    density = DEFAULT_DENSITY if options.density is None else options.density
    write_config(folder, config, Layout(tuple(specs), density, selector, packing.gate_up, packing.down))


_SAMPLE = [
    {"role": "user", "content": "Hello! How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "What is 12 + 34?"},
]
_ADVICE = "download the tokenizer files again"


def _write_tokenizer(folder: Path, source: Source, rows: int | None, chats: list[Record], note: Note) -> None:
    """Write the tokenizer files, and try out what they do.

    Args:
        rows: tokens that the model has embeddings for.
        chats: that will be read, so that their prompts have to be rendered.
    """
    source.write_tokenizer(folder)
    if left_out := keep_used_templates(folder):
        note(f"chat templates left out: {', '.join(left_out)}; the default one and the one for tools are used")
    if (reason := try_tokenizer(folder)) is not None:
        raise SourceError(f"{source.path}: its tokenizer cannot be loaded ({reason}); {_ADVICE}")
    try:
        tokenizer = load_tokenizer(folder, SourceError, _ADVICE, rows=rows)
    except SourceError as exc:
        raise SourceError(str(exc).replace(str(folder), str(source.path))) from exc
    if beyond := tokens_beyond(tokenizer, rows):
        note(f"the model has no embeddings for {listing(beyond)}; prompts with such tokens will be refused")
    if not tokenizer.has_chat_template:
        return
    for messages, needed in [*((chat.messages[:-1], True) for chat in chats), (_SAMPLE, False)]:
        try:
            render_chat(tokenizer, messages, add_generation_prompt=True)
        except PromptError as exc:
            if needed or isinstance(exc.__cause__, TemplateLimitError):
                raise SourceError(f"{source.path}: {exc}; {_ADVICE}") from exc
            note(f"a chat cannot be rendered: {exc}")


def _write_priors(folder: Path, prior: list[Scores], down_norms: list[Scores], method: str) -> None:
    tensors = {f"prior.{index}": mx.array(values) for index, values in enumerate(prior)}
    tensors |= {f"down_norm.{index}": mx.array(values) for index, values in enumerate(down_norms)}
    for name, values in tensors.items():
        if not bool(mx.all(mx.isfinite(values))):
            raise IfpruneError(f"{name}: the measured prior contains NaN or infinity; the source may be damaged")
    mx.save_safetensors(str(folder / "priors.safetensors"), tensors, {"method": method})
