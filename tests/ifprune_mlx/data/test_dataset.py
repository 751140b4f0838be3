"""Training data: files good and bad, splits, tokens and masks, and streams that resume and are shared exactly."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.data.dataloader import Batch, DataMixture, batches, shuffled
from ifprune_mlx.data.dataset import Record, read_records, split
from ifprune_mlx.data.tokenize import Example, chunked, encode, encode_all
from ifprune_mlx.errors import DataError, PromptError
from tests.tiny import TEMPLATE, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    """Every byte is a token; ChatML, whose `<|im_end|>` ends a turn."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder, {"trust_remote_code": False})


def chat(*contents: str, domain: str = "d", system: str | None = None) -> Record:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Record((*([{"role": "system", "content": system}] if system else []), *turns), domain)


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def with_template(tmp_path: Path, template: str | None) -> TokenizerWrapper:
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    if template is None:
        del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(tmp_path, {"trust_remote_code": False})


# Reading.

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def test_the_three_forms_of_mlx_lm_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        {"messages": MESSAGES, "source": "somewhere"},
        "",
        {"prompt": "Hi", "completion": "Hello."},
        {"text": "Once upon a time."},
        # mlx-lm's precedence.
        {"text": "no", "messages": MESSAGES, "prompt": "2+2?", "completion": "4"},
        {"text": "no", "messages": MESSAGES},
    )
    records = read_records(file, "talk", strict=True)
    assert records == [
        Record(tuple(MESSAGES), "talk"),
        Record(tuple(MESSAGES), "talk"),
        Record((), "talk", "Once upon a time."),
        chat("2+2?", "4", domain="talk"),
        Record(tuple(MESSAGES), "talk"),
    ]
    assert [record.instruction for record in records[:3]] == ["Hi", "Hi", "Once upon a time."]


def test_a_chat_is_read_up_to_its_last_answer(tmp_path: Path) -> None:
    more = [{"role": "user", "content": "And?", "name": "x"}, {"role": "tool", "content": "7"}]
    assert read_records(write(tmp_path / "a", {"messages": MESSAGES + more}), "d") == [Record(tuple(MESSAGES), "d")]


@pytest.mark.parametrize(("name", "opened"), [("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.bz2", bz2.open)])
def test_packed_files_unicode_and_line_ends(tmp_path: Path, name: str, opened: Callable[..., Any]) -> None:
    # U+2028 may stand in JSON as it is and is no line end here, though it is one to str.splitlines.
    content = "caf\u00e9 \u2028 \x85 \U0001f600"
    line = json.dumps({"prompt": content, "completion": "ok"}, ensure_ascii=False)
    with opened(tmp_path / name, "wb") as file:
        file.write(b"\xef\xbb\xbf" + f"{line}\r\n{line}".encode())
    assert [record.instruction for record in read_records(tmp_path / name, "d")] == [content] * 2


BAD = {
    '{"prompt": "a"': "not a chat or text; expected JSON with messages, prompt and completion, or text",
    "[" * 100_000: "expected JSON",
    "[1]": "expected a JSON object",
    '"text"': "expected a JSON object",
    '{"prompt": "a"}': "expected messages, prompt and completion, or text",
    '{"prompt": "a", "completion": 1}': "completion is not text",
    '{"prompt": ["a"], "completion": "b"}': "prompt is not text",
    '{"prompt": " ", "completion": "b"}': "the first user message is blank",
    '{"prompt": "a", "completion": "\\n"}': "the last answer is blank",
    '{"text": null}': "text is not text",
    '{"text": ""}': "text is blank",
    '{"text": "\\ud83d"}': "half a surrogate pair",
    '{"messages": "hello"}': "messages are no list",
    '{"messages": ["hello"]}': "messages are no list",
    '{"messages": []}': "no answer",
    '{"messages": [{"role": "user", "content": "a"}]}': "no answer",
    '{"messages": [{"role": "user"}]}': "the content of message 1 is not text",
    '{"messages": [{"content": "a"}]}': "the role of message 1 is not text",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "no user message before the first answer",
    json.dumps({"messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": []}]}): "of message 3",
    json.dumps({"messages": [MESSAGES[1], *MESSAGES]}): "no user message before the first answer",
    json.dumps({"messages": MESSAGES, "tools": [{"type": "function"}]}): "tools",
}


@pytest.mark.parametrize("line", BAD, ids=[reason.replace(" ", "_") for reason in BAD.values()])
def test_a_bad_line_is_reported_and_skipped_or_fatal(tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "good"}, "", line, {"text": "better"})
    told: list[str] = []
    records = read_records(file, "d", report=told.append)
    assert [record.text for record in records] == ["good", "better"]
    assert len(told) == 1
    assert told[0].startswith(f"{file}, line 3: ")
    assert BAD[line] in told[0]
    assert "\n" not in told[0]
    assert len(told[0]) < 300 + len(str(file))
    for arguments in ({"strict": True, "report": told.append}, {"strict": True}, {}):
        with pytest.raises(DataError) as caught:
            read_records(file, "d", **arguments)  # type: ignore[arg-type]
        assert str(caught.value) == told[0]
    assert len(told) == 1


def bad_files(folder: Path) -> dict[Path, str]:
    files = {
        folder / "missing": "cannot be read (No such file",
        folder: "is no ordinary file",
        folder / "empty": "holds no chats or texts; give JSON lines with",
        folder / "blank": "holds no chats or texts; give JSON lines with",
        folder / "latin": "latin, line 2: not UTF-8 text; convert",
        folder / "useless": "no line of it can be used; the first reason is",
        folder / "not.gz": "cannot be read (Not a gzipped file",
        folder / "cut.gz": "damaged after line",
        folder / "flipped.gz": "copy or download it again",
        folder / "not.bz2": "cannot be read (Invalid data",
        folder / "cut.bz2": "damaged after line",
    }
    (folder / "empty").touch()
    (folder / "blank").write_text("\n \n")
    (folder / "latin").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    (folder / "useless").write_text('{"a": 1}\n{"b": 2}\n')
    text = b"".join(b'{"text": "%d"}\n' % number for number in range(2000))
    (folder / "not.gz").write_bytes(text)
    (folder / "not.bz2").write_bytes(text)
    (folder / "cut.gz").write_bytes(gzip.compress(text)[:-200])
    (folder / "cut.bz2").write_bytes(bz2.compress(text)[:-20])
    flipped = bytearray(gzip.compress(text))
    flipped[20:40] = b"\xff" * 20
    (folder / "flipped.gz").write_bytes(flipped)
    return files


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    for file, words in bad_files(tmp_path).items():
        with pytest.raises(DataError) as caught:
            read_records(file, "d", report=lambda line: None)
        message = str(caught.value)
        assert message.startswith(str(file))
        assert words in message
        assert "\n" not in message


# Keys and splits.


def test_the_key_is_that_of_the_first_user_message() -> None:
    key = chat("What is\n2 + 2?", "4").key
    assert key == "692a9daa52e42c50"  # pinned: splits must not move between versions
    same = [chat(" what IS 2 + 2?\t", "Four.", "Thanks", "Welcome"), chat("What is \uff12 + 2?", "", system="Be kind.")]
    assert {record.key for record in same} == {key}
    assert len({record.key for record in (chat("What is 2 + 3?"), Record((), "d", "Some text."), same[0])}) == 3


def test_no_instruction_is_in_both_splits_whatever_else_is_read() -> None:
    rng = np.random.default_rng(0)
    prompts = [f"prompt {number}" for number in range(600)]
    records = [
        chat(prompts[i].upper() if i % 2 else f" {prompts[i]}", f"answer {n}") for n in range(2) for i in range(600)
    ]
    parts: dict[str, set[str]] = {"train": set(), "valid": set()}
    for record in records:
        parts[split(record, 0.1)].add(record.instruction.strip().lower())
    assert not parts["train"] & parts["valid"]
    assert 30 < len(parts["valid"]) < 90
    # In another order, and among other data.
    some = [records[i] for i in rng.permutation(len(records))[:100]]
    assert all(record.instruction.strip().lower() in parts[split(record, 0.1)] for record in some)
    # A larger share keeps what was held out.
    assert all(split(record, 0.2) == "valid" for record in records if split(record, 0.1) == "valid")
    assert {split(record, 0) for record in records} == {"train"}
    assert {split(record, 1) for record in records} == {"valid"}


# Tokens and masks.


def learned(tokenizer: TokenizerWrapper, example: Example) -> str:
    """The text of the tokens to be predicted, with a bar where something lies between."""
    runs, last = [], -2
    for index in np.flatnonzero(example.mask):
        if index != last + 1:
            runs.append([])
        runs[-1].append(int(example.tokens[index]))
        last = index
    return "|".join(tokenizer.decode(run) for run in runs)


def test_one_turn(tokenizer: TokenizerWrapper) -> None:
    record = chat("Hi\n", "\nHello.", system="Be kind.")
    example = encode(tokenizer, record, 512)
    assert example is not None
    prompt = render_messages(tokenizer, record.messages[:-1])
    assert example.prompt_length == len(prompt)
    assert example.tokens[: len(prompt)].tolist() == prompt  # exactly what inference reads
    assert tokenizer.decode(example.tokens[len(prompt) :].tolist()) == "\nHello.<|im_end|>"
    assert learned(tokenizer, example) == "\nHello.<|im_end|>"
    assert (example.tokens.dtype, example.mask.dtype) == (np.int32, np.bool_)
    assert (example.instruction, example.domain, example.key) == ("Hi\n", "d", record.key)


def test_every_answer_of_a_chat_is_learned_and_the_last_is_pointed_at(tokenizer: TokenizerWrapper) -> None:
    record = chat("One?", "1", "Two?", "2", "Three?", "3")
    example = encode(tokenizer, record, 512)
    assert example is not None
    assert learned(tokenizer, example) == "1<|im_end|>|2<|im_end|>|3<|im_end|>"
    assert example.tokens[: example.prompt_length].tolist() == render_messages(tokenizer, record.messages[:-1])
    # All of it is what the template makes of the chat, but for the line break after the last turn.
    assert example.tokens.tolist() == tokenizer.apply_chat_template(list(record.messages))[:-1]


def test_what_is_too_long_is_cut_at_the_end_or_left_out(tokenizer: TokenizerWrapper) -> None:
    record = chat("One?", "first", "Two?", "second")
    whole = encode(tokenizer, record, 512)
    assert whole is not None
    first = int(np.flatnonzero(whole.mask)[0])
    for length in range(1, len(whole.tokens) + 3):
        cut = encode(tokenizer, record, length)
        if length <= first:
            assert cut is None
            continue
        assert cut is not None
        assert cut.tokens.tolist() == whole.tokens[:length].tolist()
        assert cut.mask.tolist() == whole.mask[:length].tolist()
        assert cut.prompt_length == (whole.prompt_length if length > whole.prompt_length else first)
        assert cut.mask[cut.prompt_length]
        assert not cut.mask[cut.prompt_length - 1]


def test_without_a_template(tmp_path: Path) -> None:
    plain = with_template(tmp_path, None)
    assert not plain.has_chat_template
    record = chat("One?", "1", "Two?", "2\n")
    example = encode(plain, record, 512)
    assert example is not None
    assert example.tokens[: example.prompt_length].tolist() == render_messages(plain, record.messages[:-1])
    assert plain.decode(example.tokens.tolist()) == "One?\n1\nTwo?\n2\n<|im_end|>"
    assert learned(plain, example) == "\n1|\n2\n<|im_end|>"  # no line break is put behind what is answered


def test_a_template_that_rewrites_history_leaves_the_last_answer(tmp_path: Path) -> None:
    # As templates of reasoning models do: earlier answers lose a part, and the answer is prepared for.
    rewriting = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'].split('#')[-1])")
    for index, template in enumerate(
        (rewriting, rewriting.replace("assistant\n{% endif %}", "assistant\n@{% endif %}"))
    ):
        tokenizer = with_template(tmp_path, template)
        record = chat("One?", "think#1", "Two?", "think#2")
        example = encode(tokenizer, record, 512)
        assert example is not None
        assert learned(tokenizer, example) == ("think#2<|im_end|>", "think#2")[index]
        prompt = render_messages(tokenizer, record.messages[:-1])
        assert example.tokens[: example.prompt_length].tolist() == prompt
        assert "think" not in tokenizer.decode(prompt)


def test_chats_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
    tokenizer = with_template(tmp_path, template)
    good, long, refused = chat("Hi", "Hello"), chat("x" * 100, "y"), chat("Hi", "Hello", system="Be kind.")
    with pytest.raises(PromptError, match="no system here"):
        encode(tokenizer, refused, 64)
    told: list[str] = []
    encoded = encode_all(tokenizer, [long, good, refused, long, good], 64, told.append)
    assert [example.key for example in encoded] == [good.key] * 2
    assert told == [
        "domain 'd': 2 of 5 chats left out: the answer begins after 64 tokens",
        "domain 'd': 1 of 5 chats left out: the chat template refuses these messages (no system here)",
    ]
    for nothing, words in (([long], "after 64 tokens"), ([], "there are no chats")):
        with pytest.raises(DataError, match=words):
            encode_all(tokenizer, nothing, 64, told.append)
    assert len(told) == 2
    assert encode_all(tokenizer, [long, good, good], 64, told.append, limit=1)[0].key == good.key
    assert told[2:] == ["domain 'd': 1 of 2 chats left out: the answer begins after 64 tokens"]
    with pytest.raises(DataError, match="plain text in the data of domain 'web'"):
        encode(tokenizer, Record((), "web", "Once."), 64)


def test_text_in_pairs_of_neighbouring_chunks(tokenizer: TokenizerWrapper) -> None:
    record = Record((), "web", "abcdefghij")
    pairs = chunked(tokenizer, record, 4)
    assert [tokenizer.decode(pair.tokens.tolist()) for pair in pairs] == ["abcdefgh", "efghij<|im_end|>"]
    assert [learned(tokenizer, pair) for pair in pairs] == ["efgh", "ij<|im_end|>"]
    assert [(pair.instruction, pair.prompt_length) for pair in pairs] == [("abcd", 4), ("efgh", 4)]
    assert [pair.key for pair in pairs] == [f"{record.key}-0", f"{record.key}-1"]
    # Blank chunks select nothing; a text of one chunk has no pair.
    assert [pair.instruction for pair in chunked(tokenizer, Record((), "web", "abcd    efgh"), 4)] == ["abcd", "efgh"]
    assert chunked(tokenizer, Record((), "web", "abc"), 4) == []
    with pytest.raises(DataError, match="a chat in the data of domain 'd'"):
        chunked(tokenizer, chat("a", "b"), 4)


# Mixtures.


def numbered(name: str, count: int) -> list[Record]:
    return [chat(f"{name}{number}", "answer", domain=name) for number in range(count)]


def mixed(seed: int = 0, **changes: Any) -> DataMixture[Record]:
    sources: dict[str, Any] = {"code": (numbered("code", 7), 2.0), "maths": (numbered("maths", 3), 1.0), **changes}
    return DataMixture({name: source for name, source in sources.items() if source}, seed)


def taken(mixture: DataMixture[Record], count: int) -> list[str]:
    return [next(mixture).instruction for _ in range(count)]


def test_weights_hold_in_every_stretch() -> None:
    names = [name.rstrip("0123456789") for name in taken(mixed(), 300)]
    for start in range(0, 270, 7):
        assert abs(names[start : start + 30].count("code") - 20) <= 1
    odd = DataMixture({"a": (numbered("a", 5), 0.7), "b": (numbered("b", 5), 0.2), "c": (numbered("c", 5), 0.1)}, 0)
    names = [name[0] for name in taken(odd, 1000)]
    assert [names.count(name) for name in "abc"] == [700, 200, 100]


def test_every_epoch_holds_all_in_a_new_order() -> None:
    stream = taken(mixed(), 210)
    code = [name for name in stream if name.startswith("code")]
    epochs = [tuple(code[start : start + 7]) for start in range(0, 140, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert len(set(epochs)) > 15
    assert taken(mixed(), 210) == stream
    assert taken(mixed(seed=1), 210) != stream


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    assert shuffled(8, "0/code/0").tolist() == [4, 7, 6, 0, 3, 1, 5, 2]


def test_the_order_of_the_sources_makes_no_difference() -> None:
    sources = {"code": (numbered("code", 7), 2.0), "maths": (numbered("maths", 3), 1.0)}
    backwards = DataMixture(dict(reversed(sources.items())), 0)
    assert (taken(backwards, 50), backwards.fingerprint) == (taken(mixed(), 50), mixed().fingerprint)


@pytest.mark.parametrize("position", [0, 1, 9, 10, 57, 1000])
def test_a_mixture_resumes_exactly(position: int) -> None:
    mixture = mixed()
    taken(mixture, position)
    state = json.loads(json.dumps(mixture.state()))
    assert len(json.dumps(state)) < 200
    rest = taken(mixture, 100)
    resumed = mixed()
    taken(resumed, 5)
    resumed.restore(state)
    assert resumed.position == position
    assert taken(resumed, 100) == rest


def test_a_changed_mixture_is_not_resumed() -> None:
    state = mixed().state()
    others: list[DataMixture[Record]] = [
        mixed(seed=1),
        mixed(code=(numbered("code", 7), 1.0)),
        mixed(code=(numbered("code", 7)[::-1], 2.0)),
        mixed(code=(numbered("code", 8), 2.0)),
        mixed(code=(numbered("other", 7), 2.0)),
        mixed(code=None, coda=(numbered("code", 7), 2.0)),
        mixed(code=None),
    ]
    for other in others:
        with pytest.raises(DataError, match="changed since the run was saved"):
            other.restore(state)


def test_mixtures_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="at least one source"):
        DataMixture[Record]({}, 0)
    with pytest.raises(DataError, match="'code' holds nothing"):
        mixed(code=([], 1.0))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="'code' has the weight"):
            mixed(code=(numbered("code", 2), weight))


# Batches.


def encoded(seed: int = 0) -> DataMixture[Example]:
    rng = np.random.default_rng(5)
    sources = {}
    for name, count, weight in (("code", 23, 2.0), ("maths", 11, 1.0)):
        items = []
        for number in range(count):
            length = int(rng.integers(3, 90))
            tokens = rng.integers(1, 300, length).astype(np.int32)
            start = int(rng.integers(1, length))
            items.append(Example(tokens, np.arange(length) >= start, start, name, name, f"{name}{number}"))
        sources[name] = (items, weight)
    return DataMixture(sources, seed)


def keys(*parts: Batch) -> list[str]:
    return [example.key for part in parts for example in part.examples]


def first(count: int, size: int = 6, **arguments: Any) -> list[Batch]:
    stream = batches(encoded(), size, **arguments)
    return [next(stream) for _ in range(count)]


def targets(batch: Batch) -> int:
    return sum(int(example.mask.sum()) for example in batch.examples)


def padded(parts: list[Batch]) -> int:
    """Tokens of the batches once padded to their longest rows."""
    return sum(len(part.examples) * max(len(example.tokens) for example in part.examples) for part in parts)


def test_a_batch_counts_the_tokens_to_predict() -> None:
    for batch in first(12):
        assert len(batch.examples) == 6
        assert batch.targets == targets(batch) > 0


def test_a_pool_gives_the_same_examples_with_less_padding() -> None:
    plain, pooled = first(8, pool=1), first(8, pool=8)
    mixture = encoded()
    assert [keys(batch) for batch in plain] == [[next(mixture).key for _ in range(6)] for _ in range(8)]
    assert sorted(keys(*plain)) == sorted(keys(*pooled))
    assert padded(pooled) < 0.75 * padded(plain)
    lengths = [max(len(example.tokens) for example in batch.examples) for batch in pooled]
    assert lengths != sorted(lengths)  # the lengths of steps are shuffled


@pytest.mark.parametrize("pool", [1, 4])
@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_see_what_one_process_sees(world: int, pool: int) -> None:
    alone = first(10, pool=pool)
    ranks = [first(10, pool=pool, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert sorted(keys(*parts)) == sorted(keys(whole))
        assert {len(part.examples) for part in parts} == {6 // world}
        assert {part.targets for part in parts} == {whole.targets}
        assert sum(map(targets, parts)) == whole.targets
        assert all(part.state == whole.state for part in parts)


@pytest.mark.parametrize("pool", [1, 4])
def test_batches_resume_exactly_after_any_step(pool: int) -> None:
    whole = first(14, pool=pool)
    for step in range(9):
        state = json.loads(json.dumps(whole[step].state))
        resumed = batches(encoded(), 6, pool=pool, state=state)
        for expected in whole[step + 1 : step + 6]:
            batch = next(resumed)
            assert keys(batch) == keys(expected)
            assert (batch.targets, batch.state) == (expected.targets, expected.state)
    # With another number of processes, too.
    halves = [next(batches(encoded(), 6, pool=pool, rank=rank, world=2, state=whole[4].state)) for rank in range(2)]
    assert sorted(keys(*halves)) == sorted(keys(whole[5]))


def test_batches_that_cannot_be_made_are_refused_at_once() -> None:
    for size, world in ((6, 4), (0, 1), (-2, 1)):
        with pytest.raises(DataError, match="cannot be shared equally"):
            batches(encoded(), size, world=world)
    state = first(1)[0].state
    for changes in ({"size": 8}, {"pool": 2}):
        with pytest.raises(DataError, match="batch size or pool changed"):
            batches(encoded(), **{"size": 6, "pool": 8, "state": state, **changes})
    with pytest.raises(DataError, match="changed since the run was saved"):
        batches(encoded(seed=1), 6, state=state)
