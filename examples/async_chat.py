"""Two conversations on one model in an asyncio program: the event loop stays free, answers wait for their turn.

python examples/async_chat.py [IFP checkpoint]
"""

import asyncio
import sys
from contextlib import aclosing

from ifprune_mlx import Session, load

# Any folder that `ifprune convert` made; without one, the embedded SmolLM2 (fetched and converted at first use).
model, tokenizer = load(*sys.argv[1:2])


async def ask(session: Session, question: str) -> str:
    """The whole answer; other tasks run between its tokens."""
    return "".join([response.text async for response in session.astream(question, max_tokens=48)])


async def first_words(session: Session, question: str, count: int) -> str:
    """An answer that its reader leaves early: `aclosing` ends it at once and gives the model to the next one."""
    said = ""
    async with aclosing(session.astream(question)) as responses:
        async for response in responses:
            said += response.text
            if response.generation_tokens == count:
                break
    return said


async def main() -> None:
    """Ask both at once, then leave one answer early."""
    geography, poetry = Session(model, tokenizer), Session(model, tokenizer)
    questions = ("What is the capital of France?", "Write two lines about the sea.")
    answers = await asyncio.gather(ask(geography, questions[0]), ask(poetry, questions[1]))
    for question, text in zip(questions, answers, strict=True):
        print(f"\n> {question}\n{text}")
    question = "And what is it known for?"
    print(f"\n> {question}\n{await first_words(geography, question, 8)} ...")


asyncio.run(main())
model.close()
