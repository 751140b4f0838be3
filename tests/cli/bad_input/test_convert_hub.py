"""Bad input to `ifprune convert`: models of the hub, beyond what `tests/convert/test_hub_source.py` tries."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table

TABLE = Table()
case = TABLE.case


class EveryTime(dict[str, int]):
    """Files that the hub cuts off each time that they are asked for."""

    def pop(self, *arguments: Any) -> Any:
        return self.get(*arguments)


@case
def revision_of_a_local_path(at: Place) -> Bad:
    words = (str(at.source), "--revision is for a model of the hub")
    return Bad(at.convert(at.source, "--revision", "main"), words)


@case
def download_that_breaks_off_every_time(at: Place) -> Bad:
    folder = at.dense()
    (folder / "model.safetensors").rename(folder / "model-broken.safetensors")
    at.hub.cut = EveryTime(at.hub.cut, **{"model-broken.safetensors": 1000})
    name = at.upload(folder)
    words = (name, "model-broken.safetensors cannot be downloaded", "try again")
    return Bad(at.convert(name), words, absent=("Traceback", "Error while", "retries"), env=at.online)


@case
def model_of_the_hub_with_bytes_of_another_kind(at: Place) -> Bad:
    folder = at.dense()
    (folder / "model.safetensors").write_bytes(b"<html>" * 100)
    name = at.upload(folder)
    return Bad(at.convert(name), ("model.safetensors", "not a safetensors file", "again"), env=at.online)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
