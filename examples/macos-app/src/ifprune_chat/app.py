"""Starts the app: which model, one window, one event loop."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PySide6.QtWidgets import QApplication

from .window import Window

# A packed app carries its model: its `sys.executable` is the app itself and cannot fetch one with pip.
PACKED_MODEL = Path(__file__).parent / "resources" / "model"


def main(arguments: Sequence[str]) -> int:
    """Run the app until its window is closed; the exit code."""
    parser = argparse.ArgumentParser(prog="ifprune_chat", description="Chat with a model that selects its neurons.")
    parser.add_argument(
        "model",
        nargs="?",
        help="a folder that `ifprune convert` made, or a hub id; without it the embedded SmolLM2, fetched at first use",
    )
    # Finder adds an argument of its own (-psn_...) on some systems.
    model: str | None = parser.parse_known_args(arguments)[0].model
    if model is None and PACKED_MODEL.is_dir():
        model = str(PACKED_MODEL)
    app = QApplication([])
    app.setApplicationName("IFPrune Chat")
    window = Window()
    if model is None and not Path(sys.executable).name.lower().startswith("python"):
        window.fail("this app was packed without a model; choose one with File, Open Model")
    else:
        window.open_model(model)
    window.show()
    return app.exec()
