"""Settings of training from YAML files that are odd, damaged or hostile: one clear line for each."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ifprune_mlx import IfpruneError
from ifprune_mlx.train.config import TrainConfig, read_yaml

SOUND = "output: out\ndata: {code: code.jsonl}\n"
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in pairwise("abcdefghijk")
)
UNREADABLE = {
    "a date that is none": "seed: 2001-99-99",
    "a time zone that is none": "seed: 2001-01-01 00:00:00 +99:99",
    "a whole number that is text": "seed: !!int x",
    "a number that is text": "clip: !!float x",
    "a truth that is text": "strict: !!bool x",
    "a date that is text": "seed: !!timestamp x",
    "3,000 brackets": "densities: " + "[" * 3000 + "]" * 3000,
    "3,000 braces": "data: " + "{" * 3000,
    "a huge number": "seed: " + "9" * 6000,
    "a name that is a list": "? [a, b]\n: 1",
    "a name that is a mapping": "? {a: b}\n: 1",
    "a name in a mapping that is a list": "weight: {[a]: 1}",
    "lists that repeat lists": LAUGHS,
    "mappings that merge mappings": MERGES,
    "a list that holds itself": "densities: &a [*a, *a]",
    "mappings within mappings": "weight: {a: {b: 1}}",
    "an object of Python": "seed: !!python/object/apply:os.system [ls]",
    "a value of Python": "seed: !!python/name:os.system x",
    "half a surrogate pair": 'output: "\\uD800"',
    "a NUL": 'output: "a\\0b"',
    "an escape sequence": 'output: "\\e[31m"',
    "a name twice": "batch-size: 1\nbatch_size: 2",
    "two documents": "seed: 1\n---\nseed: 2",
    "no UTF-8": "seed: \udcff",
    "a huge number in hexadecimal digits": "iters: 0x" + "f" * 9000,
    "a huge number in sixties": "iters: " + "1:" * 900 + "1",
    "a tab": "\tseed: 1",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_yaml_can_do_ends_in_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(UNREADABLE[name], errors="surrogateescape")
    with pytest.raises(IfpruneError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}: is no YAML of options (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: .inf", "--seed inf"),
        ("seed: .nan", "--seed nan"),
        ("clip: 1e999", "--clip"),
        (f"clip: '{'9' * 400}'", "--clip"),
        ("lora_scale: .nan", "--lora-scale nan"),
        ("iters: [1, 2]", "--iters"),
        ("iters: 2001-01-01", "--iters 2001-01-01"),
        ("strict: 'false'", "--strict false: give true or false"),
        ("grad-checkpoint: 1", "--grad-checkpoint 1: give true or false"),
        ("predictor: 5", "--predictor 5: give a file or a folder"),
        ("start: [a]", "--start"),
        ("backbone: {a: 1}", "--backbone"),
        ("data: {code: 5}", "--data 5"),
        ("data: {code: null}", "--data None"),
        ("weight: 5", "--weight 5: expected NAME=X"),
        ("weight: [code]", "--weight"),
        ("selector: 5", "arms 5"),
        ("selector: [null]", "arms None"),
        ("stage: [sft]", "--stage"),
        ("1: 2", "1 is no setting"),
        ("null: 2", "null is no setting"),
        ("<<: 2", "<< is no setting"),
    ],
)
def test_values_of_other_types_are_refused_by_name(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    name = line.partition(":")[0]
    file.write_text("".join(each + "\n" for each in SOUND.splitlines() if not each.startswith(name)) + line + "\n")
    with pytest.raises(IfpruneError) as caught:
        TrainConfig.from_yaml(file)
    assert words in str(caught.value)


def test_a_file_that_repeats_itself_is_refused_before_it_takes_memory_or_time(tmp_path: Path) -> None:
    """A long list, and as many references to it as fit; a short one often; and a file that is too large."""
    file = tmp_path / "run.yaml"
    file.write_text("a: &a [" + "0," * 16000 + "0]\n" + "".join(f"b{i}: *a\n" for i in range(2500)))
    with pytest.raises(IfpruneError, match="too long"):
        read_yaml(file)
    file.write_text("a: &a [" + "0," * 99 + "0]\n" + "".join(f"b{i}: *a\n" for i in range(2500)))
    assert len(read_yaml(file)) == 2501
    file.write_text("a: " + "x" * (1 << 16))
    with pytest.raises(IfpruneError, match="is larger than"):
        read_yaml(file)
