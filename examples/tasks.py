"""A task selected once and used from then on: later questions of its kind need no selector, and no predictor run.

python examples/tasks.py [IFP checkpoint]
"""

import sys

from ifprune_convert.embedded import ensure_embedded
from ifprune_mlx import Instruction, Session, TaskStore, load, make_selector
from ifprune_mlx.chat_template import render_messages

NAME = "geography"
# Any folder that `ifprune convert` made; without one, the embedded SmolLM2 (fetched and converted at first use).
path = sys.argv[1] if len(sys.argv) > 1 else ensure_embedded(print)
model, tokenizer = load(path)
store = TaskStore(model.checkpoint)

if NAME not in [task.name for task in store.tasks()]:
    # As `ifprune select --prompt ... --save geography` does, once.
    text = "Answer questions about countries, capitals, rivers and mountains."
    tokens = render_messages(tokenizer, [{"role": "user", "content": text}])
    selected = make_selector(model).select(Instruction(text, tuple(tokens)), model.keep())
    print(f"saved to {store.save(NAME, selected.selection)}")

# As `ifprune chat --task geography` does: the selection stays whatever is said.
session = Session(model, tokenizer, selection=store.load(NAME))
for question in ("What is the capital of France?", "And which river flows through it?"):
    print(f"\n> {question}")
    for response in session.stream(question, max_tokens=64):
        print(response.text, end="", flush=True)
    stats = session.stats
    print(f"\n[task {NAME}, selection {stats.selection}: selected in {1000 * stats.select_s:.2f} ms, "
          f"switched in {1000 * stats.switch_s:.0f} ms]")  # fmt: skip

model.close()
