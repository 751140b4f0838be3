"""Where a job works: its folders, its clock, and what all stages use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_convert.calibrate import shipped_examples
from ifprune_convert.pipeline import Options, convert
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.device import this_device
from ifprune_mlx.model import Model, load
from ifprune_mlx.train.evaluation import ProgressDisplay

from .config import AdaptConfig, Stage
from .job import Job, StageRecord
from .plan import FIRST_CHATS, Budget


class Workspace:
    """The folders of a job, its record and its displays.

    Args:
        progress, note, now, sizes: as `adapt` takes them.

    Attributes:
        source: the path of the source, once it is there.
        answers: folder of the model's own answers, a file for each domain.

    Raises:
        DataError: if the folder holds another job.
    """

    def __init__(
        self,
        config: AdaptConfig,
        progress: ProgressDisplay,
        note: Callable[[str], object],
        now: Callable[[], float],
        sizes: Mapping[Stage, int],
    ) -> None:
        self.config, self.note, self.now, self.sizes, self._show = config, note, now, sizes, progress
        self.job = Job(config.work, config.identity, now)
        self.budget = Budget(config.hours)
        self.answers = config.work / "answers"
        self.source = Path()

    @cached_property
    def options(self) -> Options:
        """Of every conversion: no calibration, no curve."""
        config = self.config
        return Options(
            quantization=config.quantization,
            dtype=config.dtype,
            tolerance=None,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )

    @property
    def room(self) -> int:
        """Bytes that weights may take."""
        usable = this_device().usable
        return min(usable, self.config.memory or usable)

    @property
    def length(self) -> int:
        """Most tokens of a chat, as the plan decided."""
        return int(self.job.stage("convert").figures["length"])

    @property
    def layers(self) -> int:
        """Of the model."""
        return int(self.job.stage("convert").figures["layers"])

    def describe(self, length: int, layers: int) -> None:
        """Keep what stages have to agree on, also after a kill."""
        self.job.stage("convert").figures |= {"length": length, "layers": layers}
        self.job.save()

    @property
    def base(self) -> Path:
        """The converted model, from which everything is measured and trained."""
        return self.config.work / "base"

    @property
    def measured(self) -> Path:
        """What `calibrate` and `distill` wrote."""
        return self.config.work / "measured"

    @property
    def selected(self) -> Path:
        """The run that trains selections with the weights held still."""
        return self.config.work / "selected"

    @property
    def healed(self) -> Path:
        """The run that heals."""
        return self.config.work / "healed"

    def seconds(self, stage: Stage) -> float:
        """What a stage that begins now may take."""
        return self.budget.seconds(stage, self.job.seconds)

    def decide(self, record: StageRecord, size: int) -> None:
        """How much a stage does, from now on and after every kill."""
        record.size = size
        self.job.save()

    def first_chats(self) -> list[Record]:
        """Chats for a first prior, which stands until the model's own answers give a better one: of all sources."""
        chats = shipped_examples()  # source by source
        return chats[:: max(len(chats) // self.sizes.get("convert", FIRST_CHATS), 1)]

    def convert_to(self, folder: Path, options: Options) -> None:
        """Convert the source into a folder of the job, again if it was there."""
        with self.progress("convert", "weights") as update, self.progress("calibrate", "tokens") as calibrating:

            def report(stage: str, done: int, total: int) -> None:
                (update if stage == "convert" else calibrating)(done, total)

            convert(self.source, folder, replace(options, overwrite=folder.exists()), report, lambda line: None)

    @contextmanager
    def loaded(self, folder: Path, *, shown: bool = True) -> Iterator[tuple[Model, TokenizerWrapper]]:
        """A checkpoint's model and tokenizer, for a while; `shown` displays how far loading is."""
        with self.progress("load", "FFNs") if shown else nullcontext() as update:
            model, tokenizer = load(folder, memory=self.config.memory, progress=update)
        try:
            yield model, tokenizer
        finally:
            model.close()

    @contextmanager
    def progress(self, label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A display that keeps the job's clock as well."""
        with self._show(label, unit) as update:

            def both(done: int, total: int) -> None:
                self.job.tick()
                update(done, total)

            yield both

    def ticked_note(self, line: str) -> None:
        """A line for a person, which keeps the clock as well."""
        self.job.tick()
        self.note(line)
