"""Makes the calibration chats that ship with the converter: permissively licensed prompts, answered by the dense model.

    python scripts/make_calibration.py --model CHECKPOINT --data DATA_FOLDER --out calibration.jsonl

DATA_FOLDER holds gsm8k, mbpp, self_instruct, raschka and oasst_valid as their authors publish them; sources and
licences stand in `convert/ifprune_convert/data/README.md`. Answers are greedy.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from mlx_lm.generate import batch_generate

from ifprune_mlx import load
from ifprune_mlx.chat_template import render_messages

PER_SOURCE = {"gsm8k": 60, "mbpp": 60, "oasst": 60, "seed": 40, "raschka": 40}
LONGEST_PROMPT = 400


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompts(data: Path) -> dict[str, list[str]]:
    """All usable prompts, by source. MBPP's test tasks (11 to 510) are left out."""
    oasst = [r["prompt"] for r in read_lines(data / "oasst_valid/oasst1_valid_953.jsonl") if r["lang"] == "en"]
    found = {
        "gsm8k": [record["question"] for record in read_lines(data / "gsm8k/train.jsonl")],
        "mbpp": [r["text"] for r in read_lines(data / "mbpp/mbpp.jsonl") if r["task_id"] > 600],
        "oasst": [text.removeprefix("### Human:").split("### Assistant")[0].strip() for text in oasst if text],
        "seed": [record["instruction"] for record in read_lines(data / "self_instruct/seed_tasks.jsonl")],
        "raschka": [
            f"{r['instruction']}\n{r['input']}".strip()
            for r in json.loads((data / "raschka/instruction-data.json").read_text(encoding="utf-8"))
        ],
    }
    return {name: sorted({text for text in texts if 10 < len(text) <= LONGEST_PROMPT}) for name, texts in found.items()}


def main() -> None:
    """Sample prompts with a fixed seed, answer them in batches, write the chats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--skip", type=int, default=0, help="skip this many prompts of each source (for a held-out set)"
    )
    parser.add_argument("--per-source", type=int, help="prompts of each source, instead of the shipped numbers")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    chosen = []
    for name, texts in prompts(arguments.data).items():
        random.Random(f"calibration-{name}").shuffle(texts)
        count = arguments.per_source or PER_SOURCE[name]
        chosen += [(name, text) for text in texts[arguments.skip : arguments.skip + count]]
    chats = []
    for start in range(0, len(chosen), 20):
        batch = chosen[start : start + 20]
        tokens = [render_messages(tokenizer, [{"role": "user", "content": text}]) for _, text in batch]
        answers = batch_generate(model.module, tokenizer, tokens, max_tokens=arguments.max_tokens).texts
        for (name, text), answer in zip(batch, answers, strict=True):
            if answer.strip():
                messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                chats.append({"source": name, "messages": messages})
        print(f"{start + len(batch)} of {len(chosen)} prompts answered", flush=True)
    lines = [json.dumps(chat, ensure_ascii=False) for chat in chats]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
