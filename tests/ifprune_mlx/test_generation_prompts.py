"""What generation may be asked: which prompts, and how many tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from ifprune_mlx import History, PromptError
from ifprune_mlx.chat_template import encode_prompt
from ifprune_mlx.selection.selectors import Instruction, Selected
from tests.ifprune_mlx.generating import END, TOKENS, A, Tiny, answer, assert_in_step, tokens_of


class Countdown:
    """A sampler: the letter with id 70 so many times, then the end token."""

    def __init__(self, letters: int) -> None:
        self._left = letters

    def __call__(self, logprobs: mx.array) -> mx.array:
        self._left -= 1
        return mx.array([70 if self._left >= 0 else END])


def test_text_ids_and_messages_are_the_same_prompt(tiny: Tiny) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": "Hi"}]
    ids = encode_prompt(tiny[1], text)
    assert encode_prompt(tiny[1], messages) == ids
    assert encode_prompt(tiny[1], tuple(ids)) == ids
    answers = [tokens_of(answer(tiny, p, selection=A, max_tokens=4)) for p in (text, messages, ids)]
    assert answers[0] == answers[1] == answers[2]


def test_the_selector_reads_the_first_user_message(tiny: Tiny) -> None:
    class Spy:
        name = "spy"

        def select(self, instruction: Instruction, keep: tuple[int, ...]) -> Selected:
            seen.append(instruction.text)
            return Selected(A)

    seen: list[str] = []
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two"},
    ]
    answer(tiny, chat, selector=Spy(), max_tokens=1)
    answer(tiny, "Hello", selector=Spy(), max_tokens=1)
    answer(tiny, tiny[1].encode("Hello"), selector=Spy(), max_tokens=1)
    answer(tiny, "Hello", instruction="Other", selector=Spy(), max_tokens=1)
    assert seen == ["One", "Hello", "Hello", "Other"]


@pytest.mark.parametrize("prompt", ["", "   \n", [], ()])
def test_an_empty_prompt_is_refused(tiny: Tiny, prompt: Any) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        answer(tiny, prompt, selection=A)


def test_a_prompt_as_long_as_the_context_is_refused(tiny: Tiny) -> None:
    with pytest.raises(PromptError, match="512 tokens, the model's context holds 512; shorten it"):
        answer(tiny, [5] * 512, selection=A)
    assert tiny[0].selection is None  # refused before anything was switched
    assert answer(tiny, [5] * 511, selection=A, max_tokens=1)[-1].finish_reason == "length"


def test_history_counts_towards_the_context(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    answer(tiny, [5] * 500, dense=True, prompt_cache=history, max_tokens=2)
    with pytest.raises(PromptError, match="512 tokens"):
        answer(tiny, [5] * 10, dense=True, prompt_cache=history)
    assert_in_step(history)


@pytest.mark.parametrize("count", [0, -2, -100])
def test_a_number_of_tokens_that_makes_no_sense_is_refused(tiny: Tiny, count: int) -> None:
    with pytest.raises(PromptError, match="give a number above 0, or -1 for no limit"):
        answer(tiny, TOKENS, selection=A, max_tokens=count)


def test_one_token_can_be_asked_for(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    (response,) = answer(tiny, TOKENS, selection=A, max_tokens=1, prompt_cache=history)
    assert response.finish_reason == "length"
    assert response.stats is not None
    assert (response.stats.completion_tokens, response.stats.tokens_per_s) == (1, 0.0)
    assert history.tokens == [*TOKENS, response.token]
    assert_in_step(history)


def test_minus_one_generates_until_the_end_token(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    responses = answer(tiny, TOKENS, selection=A, max_tokens=-1, sampler=Countdown(30), prompt_cache=history)
    assert responses[-1].finish_reason == "stop"
    assert tokens_of(responses) == [70] * 30 + [END]
    assert history.tokens == TOKENS + [70] * 30 + [END]
    assert_in_step(history)


def test_an_answer_may_be_the_end_token_alone(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    (response,) = answer(tiny, TOKENS, selection=A, sampler=Countdown(0), prompt_cache=history)
    assert (response.text, response.token, response.finish_reason) == ("", END, "stop")
    assert_in_step(history)
