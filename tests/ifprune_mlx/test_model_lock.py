"""Threads and asyncio tasks on one model: real ones, whose answers equal those of a thread that has it to itself."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import GenerationResponse, IfpruneError, Model, ModelBusyError, PromptError, Selection, Session, load
from tests.cli.process import environment
from tests.family_configs import tiny_config
from tests.ifprune_mlx.generating import Broken, assert_in_step, failing, letters
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import VOCABULARY, write_checkpoint

Tiny = tuple[Model, Any]
Result = TypeVar("Result")
WIDTHS = (128, 128)
A = random_selection(WIDTHS, (48, 32), seed=1)
B = random_selection(WIDTHS, (24, 64), seed=2)


def session(tiny: Tiny, **options: Any) -> Session:
    defaults = {"selector": "random", "density": 0.25, "logits_processors": [letters]}
    return Session(*tiny, **(defaults | options))


def in_thread(call: Callable[[], Result]) -> Result:
    """What a call gives, or raises, in a thread of its own."""
    done: list[Result] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if raised:
        raise raised[0]
    return done[0]


async def told(chat: Session, text: str, max_tokens: int = 8) -> list[GenerationResponse]:
    return [response async for response in chat.astream(text, max_tokens=max_tokens)]


def text_of(responses: list[GenerationResponse]) -> str:
    return "".join(response.text for response in responses)


# One after the other, from any thread.


# Caches whose last step is no input of the last token, so that nothing but the session computes it.
CACHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rotating": ({}, {"max_kv_size": 32}),
    "quantized": (
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 30},
    ),
    "lfm2": ((tiny_config("lfm2") or {}) | {"vocab_size": VOCABULARY}, {}),
}


@pytest.mark.parametrize("kind", CACHES)
def test_any_thread_goes_on_where_another_stopped(tmp_path: Path, kind: str) -> None:
    changes, options = CACHES[kind]
    loaded = load(write_checkpoint(tmp_path / "checkpoint", **changes))
    texts = ("One", "Two", "Three")
    alone, passed = session(loaded, **options), session(loaded, **options)
    expected = [alone.ask(text, max_tokens=6) for text in texts]
    assert [in_thread(partial(passed.ask, text, max_tokens=6)) for text in texts] == expected
    assert alone.stats is not None
    assert passed.stats is not None
    assert passed.stats.reused_tokens == alone.stats.reused_tokens
    asynchronous = session(loaded, **options)
    assert [text_of(asyncio.run(told(asynchronous, text, 6))) for text in texts] == expected


def test_all_that_a_model_holds_is_computed_when_it_is_loaded(tmp_path: Path) -> None:
    # The tables of llama 3's rope are no parameters; MLX computes an array only in the thread that described it.
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    path = write_checkpoint(tmp_path / "rope", rope_scaling=scaling)
    expected = session(load(path)).ask("One", max_tokens=6)
    chat = session(load(path))
    assert in_thread(lambda: chat.ask("One", max_tokens=6)) == expected


def test_a_model_loaded_in_a_thread_is_used_in_another(tiny_checkpoint: Path, tiny: Tiny) -> None:
    loaded = in_thread(lambda: load(tiny_checkpoint))
    assert session(loaded).ask("One", max_tokens=6) == session(tiny).ask("One", max_tokens=6)


# At the same time.


def test_a_second_thread_is_refused_and_does_no_harm(tiny: Tiny) -> None:
    model = tiny[0]
    expected = session(tiny).ask("One", max_tokens=12)
    chat, other = session(tiny), session(tiny)
    uses: list[Callable[[], Any]] = [
        lambda: model.switch(A),
        lambda: model.switch(None),
        lambda: other.ask("Two", max_tokens=2),
        lambda: chat.ask("Two", max_tokens=2),
        lambda: model(mx.array([[5, 6]])),
        lambda: model.module(mx.array([[5, 6]])),
        model.close,
    ]
    said = ""
    for response in chat.stream("One", max_tokens=12):
        said += response.text
        for use in uses:
            for call in (use, partial(in_thread, use)):
                with pytest.raises(ModelBusyError, match="busy with an answer") as caught:
                    call()
                assert "\n" not in str(caught.value)
    assert said == expected
    assert (len(chat.messages), other.messages) == (2, [])
    assert other.ask("Two", max_tokens=4) == session(tiny).ask("Two", max_tokens=4)


def test_a_thread_in_the_middle_of_a_token_is_not_disturbed(tiny: Tiny) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held(tokens: mx.array, logits: mx.array) -> mx.array:
        begun.set()
        assert go_on.wait(60)
        return letters(tokens, logits)

    expected = session(tiny).ask("One", max_tokens=6)
    chat = session(tiny, logits_processors=[held])
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(chat.ask("One", max_tokens=6)))
    thread.start()
    assert begun.wait(60)
    for call in (lambda: tiny[0].switch(B), lambda: session(tiny).ask("Two")):
        with pytest.raises(ModelBusyError):
            call()
    go_on.set()
    thread.join(60)
    assert said == [expected]


def test_a_conversation_is_not_changed_under_its_answer(tiny: Tiny, tmp_path: Path) -> None:
    chat = session(tiny)
    chat.save(tmp_path / "chat.json")
    changes: list[Callable[[], Any]] = [
        chat.reset,
        chat.reselect,
        lambda: chat.use(A),
        lambda: chat.set_budget(density=0.5),
        lambda: chat.load(tmp_path / "chat.json"),
    ]
    for response in chat.stream("One", max_tokens=3):  # noqa: B007
        for change in changes:
            with pytest.raises(ModelBusyError, match="of this conversation"):
                change()
        chat.save(tmp_path / "chat.json")
    assert response.finish_reason == "length"
    for change in changes:
        change()


def test_another_threads_answer_can_neither_be_read_nor_closed(tiny: Tiny) -> None:
    expected = session(tiny).ask("One", max_tokens=6)
    chat = session(tiny)
    responses = chat.stream("One", max_tokens=6)
    said = next(responses).text
    for call in (lambda: next(responses), responses.close):
        with pytest.raises(ModelBusyError, match="in the thread that began it"):
            in_thread(call)
    assert said + "".join(response.text for response in responses) == expected
    assert chat.messages[1]["content"] == expected


def test_an_answer_closed_early_is_kept_so_far(tiny: Tiny) -> None:
    chat = session(tiny)
    responses = chat.stream("One", max_tokens=9)
    said = "".join(next(responses).text for _ in range(3))
    responses.close()
    responses.close()
    assert list(responses) == []
    assert [message["content"] for message in chat.messages] == ["One", said]
    read = len(chat.history.tokens)
    chat.ask("Two", max_tokens=4)
    assert chat.stats is not None
    assert chat.stats.reused_tokens == read


# mlx-lm cannot leave a stream in another thread than it entered it, and says so on stderr.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_answer_dropped_in_another_thread_gives_the_model_back(tiny: Tiny) -> None:
    chat, fresh = session(tiny), session(tiny)
    answers = [chat.stream("One", max_tokens=9)]
    said = "".join(next(answers[0]).text for _ in range(3))
    in_thread(answers.clear)
    assert [message["content"] for message in chat.messages] == ["One", said]
    assert chat.selection is not None
    fresh.messages = list(chat.messages)
    fresh.use(chat.selection)
    assert chat.ask("Two", max_tokens=6) == fresh.ask("Two", max_tokens=6)
    assert_in_step(chat.history)


def test_another_thread_cancels(tiny: Tiny) -> None:
    chat = session(tiny)
    said = ""
    for response in chat.stream("One", max_tokens=50):
        said += response.text
        if response.generation_tokens == 3:
            in_thread(chat.cancel)
    assert (response.finish_reason, len(said)) == ("cancelled", 4)
    chat.cancel()  # nothing is under way: the next answer is not cancelled
    assert len(chat.ask("Two", max_tokens=4)) == 4


# asyncio.


def test_astream_says_what_stream_says(tiny: Tiny) -> None:
    alone, chat = session(tiny), session(tiny)
    for text in ("One", "Two"):
        expected = list(alone.stream(text, max_tokens=8))
        responses = asyncio.run(told(chat, text))
        assert [r.token for r in responses] == [r.token for r in expected]
        assert (text_of(responses), responses[-1].finish_reason) == (text_of(expected), "length")
        assert responses[-1].stats is not None
    assert chat.messages == alone.messages
    # And back in this thread.
    assert chat.ask("Three", max_tokens=8) == alone.ask("Three", max_tokens=8)


def test_eight_tasks_on_two_selections_answer_as_one_after_the_other(tiny: Tiny) -> None:
    texts = [f"Question {index}" for index in range(8)]
    selections: list[Selection] = [A, B] * 4

    def chats() -> list[Session]:
        return [session(tiny, selection=selection) for selection in selections]

    def figures(responses: list[GenerationResponse]) -> list[tuple[int, float]]:
        """Tokens alone might agree by chance."""
        return [(response.token, float(response.logprobs[response.token].item())) for response in responses]

    expected = []
    for chat, text in zip(chats(), texts, strict=True):
        expected.append([figures(list(chat.stream(said, max_tokens=8))) for said in (text, "And?")])
    order: list[int] = []

    async def converse(index: int, chat: Session) -> list[list[tuple[int, float]]]:
        first = figures(await told(chat, texts[index]))
        order.append(index)
        return [first, figures(await told(chat, "And?"))]

    async def main() -> list[list[list[tuple[int, float]]]]:
        return await asyncio.gather(*(converse(index, chat) for index, chat in enumerate(chats())))

    answers = np.array(asyncio.run(main()))
    # The order of the slots, and with it that of a sum, depends on the selections before.
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    assert order == list(range(8))
    apart = [np.abs(answers[one] - answers[other]).max() for one, other in combinations(range(8), 2)]
    assert min(apart) > 1e-3


def test_two_event_loops_share_a_model(tiny: Tiny) -> None:
    expected = {text: session(tiny).ask(text, max_tokens=8) for text in ("One", "Two", "Three", "Four")}
    said: dict[str, str] = {}

    def loop(*texts: str) -> None:
        for text in texts:
            said[text] = text_of(asyncio.run(told(session(tiny), text)))

    threads = [threading.Thread(target=loop, args=texts) for texts in (("One", "Two"), ("Three", "Four"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said == expected


def test_the_event_loop_stays_free_and_no_token_is_computed_ahead_of_its_reader(tiny: Tiny) -> None:
    calls = 0

    def counted(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        assert threading.current_thread() is not threading.main_thread()
        return letters(tokens, logits)

    async def main() -> None:
        async for response in session(tiny, logits_processors=[counted]).astream("One", max_tokens=6):
            await asyncio.sleep(0.02)
            assert calls <= response.generation_tokens + 1

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancel", "aclose", "break"])
def test_an_answer_left_early_is_kept_so_far_and_the_next_equals_a_fresh_one(tiny: Tiny, how: str) -> None:
    chat = session(tiny)
    calls = 0

    def counted(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        return letters(tokens, logits)

    chat.options["logits_processors"] = [counted]
    said: list[str] = []

    async def read(reached: asyncio.Event) -> None:
        async with aclosing(chat.astream("One", max_tokens=400)) as responses:
            async for response in responses:
                said.append(response.text)
                if len(said) == 3:
                    reached.set()
                    if how == "aclose":
                        await responses.aclose()
                    elif how == "break":
                        break

    async def main() -> None:
        reached = asyncio.Event()
        task = asyncio.create_task(read(reached))
        await reached.wait()
        if how == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.wait([task])

    asyncio.run(main())
    kept = chat.messages[1]["content"]
    assert kept.startswith("".join(said))
    assert len(kept) <= len(said) + 1  # the token in work at the time
    assert calls <= len(kept) + 1
    fresh = session(tiny)
    fresh.messages = list(chat.messages)
    assert chat.selection is not None
    fresh.use(chat.selection)
    assert chat.ask("Two", max_tokens=8) == fresh.ask("Two", max_tokens=8)
    assert_in_step(chat.history)


def test_cancelling_while_the_prompt_is_read_changes_nothing(tiny: Tiny) -> None:
    chat = session(tiny, prefill_step_size=4)
    reading, go_on = threading.Event(), threading.Event()
    chunks: list[int] = []

    def progress(done: int, total: int) -> None:
        chunks.append(done)
        reading.set()
        assert go_on.wait(60)

    async def main() -> None:
        async def read() -> None:
            async for _ in chat.astream("One " * 20, progress=progress):
                pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(reading.wait)
        task.cancel()
        await asyncio.sleep(0)  # the task says stop, and then waits for the chunk in work
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert (len(chunks), chat.messages, chat.selection) == (1, [], None)
    assert chat.ask("Two", max_tokens=4) == session(tiny).ask("Two", max_tokens=4)


def test_a_task_that_waits_for_its_turn_can_be_cancelled(tiny: Tiny) -> None:
    first, second, third = (session(tiny) for _ in range(3))

    async def main() -> list[str]:
        async with aclosing(first.astream("One", max_tokens=8)) as responses:
            said = (await anext(responses)).text
            waiting = [asyncio.create_task(told(chat, "Two")) for chat in (second, third)]
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in waiting)
            waiting[0].cancel()
            said += "".join([response.text async for response in responses])
        done = await asyncio.wait_for(waiting[1], 60)
        assert waiting[0].cancelled()
        return [said, text_of(done)]

    expected = [session(tiny).ask(text, max_tokens=8) for text in ("One", "Two")]
    assert asyncio.run(main()) == expected
    assert second.messages == []


def test_a_turn_given_to_a_task_as_it_is_cancelled_goes_to_the_next(tiny: Tiny) -> None:
    async def main() -> str:
        model = tiny[0]
        answers = session(tiny).astream("One", max_tokens=8)
        await anext(answers)
        waiting = [asyncio.create_task(told(session(tiny), "Two")) for _ in range(2)]
        await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(answers.aclose())
        while model.lock._waiting and len(model.lock._waiting) == 2:
            await asyncio.sleep(0)
        waiting[0].cancel()
        await closing
        return text_of(await asyncio.wait_for(waiting[1], 60))

    for _ in range(5):
        assert asyncio.run(main()) == session(tiny).ask("Two", max_tokens=8)


def test_an_error_comes_out_where_the_answer_is_awaited(tiny: Tiny) -> None:
    processors: list[Callable[..., Any]] = [letters, failing(2)]
    chat = session(tiny, logits_processors=processors)
    with pytest.raises(Broken):
        asyncio.run(told(chat, "One"))
    processors.pop()
    with pytest.raises(PromptError, match="is empty"):
        asyncio.run(told(chat, " "))
    assert chat.messages == []
    assert text_of(asyncio.run(told(chat, "Two"))) == session(tiny).ask("Two", max_tokens=8)


def test_astream_and_stream_at_once(tiny: Tiny) -> None:
    chat, other = session(tiny), session(tiny)

    async def main() -> None:
        async with aclosing(chat.astream("One", max_tokens=8)) as responses:
            await anext(responses)
            with pytest.raises(IfpruneError, match="busy"):
                other.ask("Two")
            with pytest.raises(ModelBusyError):
                chat.reset()
        assert len(other.ask("Two", max_tokens=3)) == 3

    asyncio.run(main())


def test_the_worker_ends_with_the_model(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint)
    before = threading.active_count()
    asyncio.run(told(session((model, tokenizer)), "One", 2))
    asyncio.run(told(session((model, tokenizer)), "One", 2))
    assert threading.active_count() == before + 1
    model.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("end", ["", "task.cancel()", "raise SystemExit(0)"])
def test_a_program_ends_in_the_middle_of_an_answer(tiny_checkpoint: Path, tmp_path: Path, end: str) -> None:
    code = f"""
import asyncio, sys
from ifprune_mlx import Session, load
async def read(session):
    async for response in session.astream("One", max_tokens=-1):
        print(response.generation_tokens, flush=True)
async def main():
    task = asyncio.create_task(read(Session(*load(sys.argv[1]), selector="random")))
    await asyncio.sleep(0.5)
    {end or "pass"}
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_checkpoint)],
        env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
