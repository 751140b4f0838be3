"""Answers that a grammar constrains: JSON that its schema allows, whatever the model would rather say."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx import load
from ifprune_mlx.constraint import Constraint, Grammar, Grammars, json_rule
from ifprune_mlx.errors import GrammarError
from ifprune_mlx.serving.engine.request import GenerationFailedError, Request, SamplingParams
from tests.ifprune_mlx.serving.engine.engines import Tiny, accepts, make_request, serving, stats_of, text_of, together
from tests.random_schemas import random_schema
from tests.tiny import add_tokens, write_checkpoint, write_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def constrained(grammar: Grammar, seed: int, **changes: Any) -> Request:
    given: dict[str, Any] = {"sampling": SamplingParams(temperature=1.0, seed=seed), "max_tokens": 2000, **changes}
    return make_request(selection=None, grammar=grammar, **given)


def every_answer_satisfies(tiny: Tiny, seeds: range, **settings: Any) -> None:
    grammars = Grammars(tiny[1])
    schemas = [random_schema(seed) for seed in seeds]
    compiled = [grammars.compile(f"answer: {json_rule(schema)}", ()) for schema in schemas]
    with serving(tiny) as engine:
        answers = together(
            engine, *(constrained(each, seed, **settings) for seed, each in zip(seeds, compiled, strict=True))
        )
        cut = together(
            engine, *(constrained(each, seed, max_tokens=3, **settings) for seed, each in enumerate(compiled))
        )
    for schema, outputs, short in zip(schemas, answers, cut, strict=True):
        assert stats_of(outputs).finish_reason == "stop"
        jsonschema.validate(json.loads(text_of(outputs)), schema)
        assert stats_of(short).finish_reason == "length"
        assert text_of(short).startswith("{")


def test_random_schemas(roomy: Tiny) -> None:
    every_answer_satisfies(roomy, range(6))


@pytest.mark.slow
def test_fifty_random_schemas(roomy: Tiny) -> None:
    every_answer_satisfies(roomy, range(50))


@pytest.mark.slow
def test_fifty_random_schemas_with_a_real_model(smollm2: Path) -> None:
    model, tokenizer = load(smollm2)
    try:
        every_answer_satisfies((model, tokenizer), range(50))
    finally:
        model.close()


def test_with_penalties_log_probabilities_stop_strings_and_free_neighbours(roomy: Tiny) -> None:
    grammar = Grammars(roomy[1]).compile(f"answer: {json_rule(PERSON)}", ())
    settings = SamplingParams(
        temperature=1.5,
        top_p=0.8,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=1.0,
        seed=3,
        logit_bias={5: 100.0},
    )
    free = make_request(selection=None, max_tokens=40)
    with serving(roomy) as engine:
        [expected] = together(engine, free)
        outputs, beside, stopped = together(
            engine,
            constrained(grammar, 1, sampling=settings, logprobs=3),
            free,
            constrained(grammar, 1, sampling=settings, stop=('"age"',)),
        )
    jsonschema.validate(json.loads(text_of(outputs)), PERSON)
    assert "".join(token.text for output in outputs for token in output.tokens) == text_of(outputs)
    assert text_of(beside) == text_of(expected)
    assert stats_of(stopped).matched_stop == '"age"'
    assert text_of(outputs).startswith(text_of(stopped))


def test_families_that_do_not_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifprune_mlx.serving.engine.engine.can_batch", lambda model: False)
    model, tokenizer = load(write_checkpoint(tmp_path / "checkpoint"))
    grammar = Grammars(tokenizer).compile(f"answer: {json_rule(PERSON)}", ())
    with serving((model, tokenizer)) as engine:
        for outputs in together(engine, constrained(grammar, 1), constrained(grammar, 2)):
            jsonschema.validate(json.loads(text_of(outputs)), PERSON)
    model.close()


def test_a_grammar_that_fails_ends_its_request_alone(roomy: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammars(roomy[1]).compile(f"answer: {json_rule(PERSON)}", ())
    free, masked = make_request(selection=None, max_tokens=20), Constraint.__call__

    def failing(self: Constraint, tokens: mx.array, logits: mx.array) -> mx.array:
        masked(self, tokens, logits)
        self._matcher.consume_token(1)  # no token of the grammar
        return masked(self, tokens, logits)

    with serving(roomy) as engine:
        [expected] = together(engine, free)
        monkeypatch.setattr(Constraint, "__call__", failing)
        with pytest.raises(GenerationFailedError, match="grammar failed"):
            together(engine, constrained(grammar, 1))
        monkeypatch.undo()
        [again] = together(engine, free)
    assert text_of(again) == text_of(expected)


BAD = {
    "unknown type": {"type": "strin"},
    "unsupported keyword": {"not": {"type": "string"}},
    "unsatisfiable": {"type": "integer", "minimum": 5, "maximum": 3},
    "look-ahead": {"type": "string", "pattern": "^(?=a)"},
    "unknown format": {"type": "string", "format": "shoe size"},
    "missing reference": {"$ref": "#/$defs/a"},
    "remote reference": {"$ref": "http://127.0.0.1:9/schema"},
    "file reference": {"$ref": "file:///etc/passwd"},
    "overlapping oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "long": {"enum": ["x" * 200_000]},
    "explosive": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(8)]},
    "endless": {"type": "integer", "allOf": [{"multipleOf": 10007}, {"multipleOf": 9973}]},
    "deep": json.loads('{"type":"array","items":' * 300 + "{}" + "}" * 300),
}


@pytest.mark.parametrize("name", BAD)
def test_schemas_that_cannot_be_used_are_refused_soon(name: str, tiny: Tiny) -> None:
    begun = time.monotonic()
    with pytest.raises(GrammarError) as caught:
        Grammars(tiny[1]).compile(f"answer: {json_rule(BAD[name])}", ())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.monotonic() - begun < 60


def test_keywords_that_are_not_supported_are_ignored_if_asked(tiny: Tiny) -> None:
    Grammars(tiny[1]).compile(f"answer: {json_rule({'type': 'string', 'format': 'shoe size'}, lenient=True)}", ())


def thinking_tokenizer(folder: Path) -> Any:
    from mlx_lm.utils import load_tokenizer

    write_tokenizer(folder)
    add_tokens(folder, ["<think>", "</think>"])
    (folder / "config.json").write_text("{}")
    return load_tokenizer(folder)


TEXT = '{"name": "Ada", "age": 36}'


@pytest.mark.parametrize(
    ("prompt", "answer", "accepted"),
    [
        ("hi", TEXT, True),
        ("hi", f'<think>I say {{"name"\n</think>\n\n{TEXT}', True),
        ("hi<think>\n", f"well</think>{TEXT}", True),
        ("hi<think>\n", TEXT, False),  # these are thoughts, which have not ended
        ("hi<think>\n\n</think>\n\n", TEXT, True),
        ("hi<think>\n\n</think>\n\n", f"<think>no</think>{TEXT}", False),
        ("a<think>b</think>c", f"<think>so</think>{TEXT}", True),  # thoughts of an earlier turn
        ("What does <think> mean?", TEXT, True),
        ("What does <think> mean?", f"<think>so</think>{TEXT}", True),
        ("What does <think> mean?", f"well</think>{TEXT}", False),
    ],
)
def test_thoughts_are_free_and_the_answer_after_them_is_not(
    prompt: str, answer: str, accepted: bool, tmp_path: Path
) -> None:
    tokenizer = thinking_tokenizer(tmp_path)
    assert tokenizer.has_thinking
    grammar = Grammars(tokenizer).compile(f"answer: {json_rule(PERSON)}", tokenizer.encode(prompt))
    assert accepts(grammar, tokenizer, answer) == accepted


@pytest.mark.parametrize(
    ("prompt", "answer", "continues", "accepted"),
    [
        ("hi", f"[THINK]I say [/TH and more[/THINK]\n{TEXT}", False, True),
        ("hi", f"[THINK]I say{TEXT}", False, False),
        ("hi[THINK]\n", f"well[/THINK]{TEXT}", False, True),
        ("hi[THINK]\n", TEXT, False, False),
        ("hi[THINK]\n[/THINK]\n", f"[THINK]no[/THINK]{TEXT}", False, False),
        ("I say: ", TEXT, True, True),
        ("I say: ", f"[THINK]no[/THINK]{TEXT}", True, False),  # the answer has begun before
    ],
)
def test_marks_of_thoughts_that_are_no_tokens(
    prompt: str, answer: str, continues: bool, accepted: bool, tiny: Tiny
) -> None:
    plain = tiny[1]
    tokenizer = TokenizerWrapper(plain._tokenizer, eos_token_ids=plain.eos_token_ids)
    tokenizer.chat_template, before = "{# [THINK] [/THINK] #}", plain.chat_template
    try:
        rule = f"answer: {json_rule(PERSON)}"
        grammar = Grammars(tokenizer).compile(rule, tokenizer.encode(prompt), continues=continues)
    finally:
        plain.chat_template = before
    assert accepts(grammar, tokenizer, answer) == accepted


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-6},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_p": 1e-12},
    ],
    ids=str,
)
def test_sampling_values_too_small_to_compute_with_take_the_likeliest_token(settings: Any, tiny: Tiny) -> None:
    greedy = make_request(selection=None)
    tiny_values = replace(greedy, sampling=replace(greedy.sampling, **settings))
    with serving(tiny) as engine:
        expected, got = together(engine, greedy, tiny_values)
    assert text_of(got) == text_of(expected)


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "text", "accepted"),
    [
        (OPEN, '{"a": 1}', True),
        (OPEN, '{"a": 1, "more": 2}', False),  # a model that is at a loss would add properties without end
        (OPEN | {"additionalProperties": True}, '{"a": 1, "more": 2}', True),
        (OPEN | {"required": ["more"]}, '{"a": 1, "more": 2}', True),
        ({"allOf": [OPEN, {"properties": {"more": {}}}]}, '{"a": 1, "more": 2}', True),
        ({"$ref": "#/$defs/a", "properties": {"more": {}}, "$defs": {"a": OPEN}}, '{"a": 1, "more": 2}', True),
        ({"enum": [{"properties": {}}]}, '{"properties": {}}', True),
        ({"properties": {"properties": {"type": "string"}}, "type": "object"}, '{"properties": "x"}', True),
    ],
)
def test_objects_get_the_properties_that_the_schema_names(schema: Any, text: str, accepted: bool, tiny: Tiny) -> None:
    grammar = Grammars(tiny[1]).compile(f"answer: {json_rule(schema)}", ())
    assert accepts(grammar, tiny[1], text) == accepted
