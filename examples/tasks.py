"""A task selected once and used from then on: later questions of its kind need no selector, and no predictor run.

python examples/tasks.py [IFP checkpoint]
"""

import sys

from ifprune_mlx import Session, TaskStore, load

NAME = "geography"
# Any folder that `ifprune convert` made; without one, the embedded SmolLM2 (fetched and converted at first use).
model, tokenizer = load(*sys.argv[1:2])
store = TaskStore(model.checkpoint)

if NAME not in [task.name for task in store.tasks()]:
    # As `ifprune select --prompt ... --save geography` does, once.
    text = "Answer questions about countries, capitals, rivers and mountains."
    Session(model, tokenizer).select(text).save(NAME)
    print(f"saved to {store.folder / NAME}.safetensors")

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
