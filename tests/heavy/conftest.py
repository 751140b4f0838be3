"""Heavy tests run only when they are asked for: `pytest -m heavy`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip heavy tests unless `-m` names them."""
    if "heavy" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.skip(reason="heavy; run with -m heavy"))
