"""Bad models of those that `ifprune generate` would convert into the cache first, and bad names of `ifprune models`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table, cut, edit_json
from tests.cli.bad_input.test_convert_hub import EveryTime
from tests.cli.process import full_disk

TABLE = Table()
case = TABLE.case


@case
def family_that_mlx_lm_lacks(at: Place) -> Bad:
    folder = at.dense(model_type="gpt9")
    return Bad(at.generate(folder), (str(folder), "has no model_type 'gpt9'"))


@case
def gguf_of_another_architecture(at: Place) -> Bad:
    file = at.gguf(general__architecture="gpt9")
    return Bad(at.generate(file), (str(file), "gpt9"))


@case
def gguf_that_is_cut_short(at: Place) -> Bad:
    file = at.gguf()
    cut(file, file.stat().st_size // 2)
    return Bad(at.generate(file), (str(file), "cut short", "again"))


@case
def model_without_tokenizer(at: Place) -> Bad:
    folder = at.dense()
    (folder / "tokenizer.json").unlink()
    return Bad(at.generate(folder), (str(folder), "tokenizer"))


@case
def template_that_raises(at: Place) -> Bad:
    folder = at.dense()
    edit_json(
        folder / "tokenizer_config.json", lambda config: config.update(chat_template="{{ raise_exception('no') }}")
    )
    return Bad(at.generate(folder), ("chat template",))


@case
def disk_that_fills_up(at: Place) -> Bad:
    return Bad(at.generate(at.dense()), ("cannot be written", "free space"), prelude=full_disk(100_000))


@case
def cache_that_is_a_file(at: Place) -> Bad:
    cache = at / "cache"
    cache.write_text("")
    return Bad(at.generate(at.dense()), (str(cache), "set IFPRUNE_CACHE"), env={"IFPRUNE_CACHE": str(cache)})


@case
def quantized_model_with_more_memory_than_there_is(at: Place) -> Bad:
    name = at.upload(at.source)
    at.hub.parameters[name] = 10**15
    return Bad(at.generate(name), (name, "is not converted", "--residency ssd"), env=at.online)


@case
def model_larger_than_the_disk(at: Place) -> Bad:
    name = at.upload(at.source)
    at.hub.sizes[name, "model.safetensors"] = 10**18
    return Bad(at.generate(name), (name, "TB to download", "free some space"), env=at.online)


@case
def download_that_breaks_off(at: Place) -> Bad:
    folder = at.dense()
    (folder / "model.safetensors").rename(folder / "model-cut.safetensors")
    at.hub.cut = EveryTime(at.hub.cut, **{"model-cut.safetensors": 1000})
    name = at.upload(folder)
    return Bad(at.generate(name), (name, "model-cut.safetensors cannot be downloaded", "try again"), env=at.online)


@case
def repository_of_pickles(at: Place) -> Bad:
    name = at.upload(at.source)
    files = at.hub.repositories[name]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    return Bad(at.generate(name), (name, "as Python pickles only"), env=at.online)


@case
def repository_of_many_ggufs(at: Place) -> Bad:
    name = at.upload(at.source)
    at.hub.repositories[name] = {"a-Q4_0.gguf": b"GGUF", "a-Q8_0.gguf": b"GGUF"}
    return Bad(at.generate(name), (f"name one, as in --model {name}:a-Q4_0.gguf",), env=at.online)


@case
def gguf_that_the_repository_lacks(at: Place) -> Bad:
    name = at.upload(at.source)
    return Bad(at.generate(f"{name}:a.gguf"), (name, "has no file a.gguf"), env=at.online)


@case
def gguf_of_the_hub_without_the_hub(at: Place) -> Bad:
    return Bad(at.generate("org/none:a.gguf"), ("org/none", "HF_HUB_OFFLINE is set; unset it"))


@case
def model_to_remove_that_is_not_there(at: Place) -> Bad:
    return Bad(["models", "--json", "--remove", "org/none"], ("org/none", "is not in the cache, which holds"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check, shared: Path) -> None:
    check(name)
    assert list(shared.glob("cache/models/*/*")) == []
