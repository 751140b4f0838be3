"""What reads the instruction for a predictor that is to be distilled: a small model of its own, or the first layers of
the model itself."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.checkpoint.atomic_write import sha256_file, write_atomic
from ifprune_mlx.errors import DataError, PredictorError
from ifprune_mlx.model import Model
from ifprune_mlx.selection.predictor import features, instruction_tokens, load_backbone

_KEPT = {".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class Backbone:
    """A reader of instructions.

    Attributes:
        module: an mlx-lm model.
        context_length: the most tokens that it reads, if it has a limit.
        layers: how many first layers it runs; None for all.
        folder: where a backbone of its own lies; None for the first layers of the model that is selected for.
    """

    module: nn.Module
    tokenizer: TokenizerWrapper
    context_length: int | None
    layers: int | None = None
    folder: Path | None = None

    @classmethod
    def first_layers(cls, model: Model, layers: int) -> Backbone:
        """The first layers of a model that was loaded with its tokenizer, and is dense whenever they read."""
        assert model.tokenizer is not None
        return cls(model.module, model.tokenizer, model.context_length, layers)

    @classmethod
    def load(cls, folder: Path) -> Backbone:
        """Load a small mlx-lm model and its tokenizer.

        Raises:
            PredictorError: naming the folder or the file, if it is none.
        """
        if not (folder / "config.json").is_file():
            raise PredictorError(f"{folder}: has no config.json; give an mlx-lm model folder with its tokenizer")
        return cls(*load_backbone(folder), folder=folder)

    def features(self, instructions: Sequence[str]) -> mx.array:
        """What the head can see of instructions, float32 `[n, 2 d]`: the last token's hidden state, then their mean.

        Raises:
            PredictorError: if one has no tokens, or the family does not expose its hidden states.
        """
        texts = [instruction_tokens(self.tokenizer, text, self.context_length) for text in instructions]
        return features(self.module, texts, self.layers)

    def identity(self) -> str | None:
        """Hash (16 hexadecimal digits) of the files of a backbone of its own."""
        if self.folder is None:
            return None
        digest = hashlib.sha256()
        for file in backbone_files(self.folder):
            digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        return digest.hexdigest()[:16]


def backbone_files(folder: Path) -> list[Path]:
    """The files of a model folder that make a backbone: config, weights, tokenizer; sorted, and never a head."""
    files = [*folder.glob("model*.safetensors"), *(file for file in folder.iterdir() if file.suffix in _KEPT)]
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def copy_backbone(source: Path, folder: Path) -> None:
    """Copy a backbone to where its head is going to be.

    Raises:
        DataError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in backbone_files(source) if not folder.samefile(source) else ():
        write_atomic(folder / file.name, partial(shutil.copyfile, file), DataError)
