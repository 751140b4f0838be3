"""The model's own answers to prompts, several at a time: chats to learn from that need no given answers.

Prompts are enough to train on any model, and its own answers are what it says by itself. An answer is sampled with
random numbers that the seed, the prompt and the position fix. It does not depend on the other prompts but for rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, takewhile

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.data.dataset import Message, Record

_MARGIN = 8  # tokens that an answer may lose when its text is encoded again


def own_answers(
    module: nn.Module,
    tokenizer: TokenizerWrapper,
    records: Sequence[Record],
    *,
    max_length: int,
    batch_size: int = 32,
    temperature: float = 0.7,
    seed: int = 0,
) -> Iterator[Record]:
    """Answer the first prompt of each chat, and give the chats with those answers, each when it is finished.

    An answer may be a little longer than a chat of `max_length` tokens allows. So one that is cut off here is cut off
    by training as well, and never seems to end there. Prompts that leave no room, and blank answers, are left out.

    Args:
        module: mlx-lm's model, dense and able to decode sequences together.
        records: chats; their own answers are not looked at.
        temperature: 0 takes the likeliest token.

    Raises:
        PromptError: if the chat template refuses a prompt.
    """
    generator = BatchGenerator(
        module,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=batch_size,
        prefill_batch_size=min(batch_size, 8),
    )
    waiting, running = iter(records), dict[int, tuple[Record, list[int]]]()
    try:
        while True:
            for record in islice(waiting, batch_size - len(running)):
                prompt = _prompt(record)
                tokens = render_messages(tokenizer, prompt)
                room = max_length + _MARGIN - len(tokens)
                if room > _MARGIN:
                    sampler = _sampler(temperature, f"{seed}/{record.key}")
                    (uid,) = generator.insert([tokens], [room], samplers=[sampler])
                    running[uid] = replace(record, messages=tuple(prompt)), []
            if not running:
                return
            for response in generator.next()[1]:
                record, answer = running[response.uid]
                if response.finish_reason != "stop":
                    answer.append(response.token)
                if response.finish_reason is None:
                    continue
                del running[response.uid]
                text = tokenizer.decode(answer)
                if text.strip():
                    yield replace(record, messages=(*record.messages, {"role": "assistant", "content": text}))
    finally:
        generator.close()


def _prompt(record: Record) -> list[Message]:
    """The messages before the first answer."""
    return list(takewhile(lambda message: message["role"] != "assistant", record.messages))


def _sampler(temperature: float, seed: str) -> Callable[[mx.array], mx.array]:
    """Samples one sequence's tokens, whatever else is sampled."""
    if temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    state = [mx.random.key(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))]

    def sample(logprobs: mx.array) -> mx.array:
        state[0], key = mx.random.split(state[0])
        return mx.random.categorical(logprobs / temperature, key=key)

    return sample
