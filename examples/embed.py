"""What a macOS developer would paste: load, select by the instruction, stream the answer.

python examples/embed.py [IFP checkpoint]
"""

import sys

from ifprune_mlx import Session, load

# Any folder that `ifprune convert` made; without one, the embedded SmolLM2 (fetched and converted at first use).
model, tokenizer = load(*sys.argv[1:2])
session = Session(model, tokenizer, policy="first")

for question in ("What is the capital of France?", "And what is it known for?"):
    print(f"\n> {question}")
    for response in session.stream(question, max_tokens=64):
        print(response.text, end="", flush=True)
    stats = session.stats
    print(f"\n[{stats.selector}: {stats.active_parameters:,} of {stats.total_parameters:,} parameters, "
          f"selected in {stats.select_s:.2f} s, {stats.tokens_per_s:.0f} tokens/s]")  # fmt: skip

model.close()
