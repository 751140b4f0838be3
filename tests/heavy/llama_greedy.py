"""Runs in an interpreter that has llama_cpp: greedy answers and their logits, by llama.cpp.

    python llama_greedy.py MODEL.gguf OUT.npz < jobs.json

A job is {"text": ..., "follow": null or token ids, "count": n}: the text is read, then n tokens are chosen greedily, or
those of `follow` are read. OUT holds, per job i: prompt_i (token ids), tokens_i (the likeliest token of every step) and
logits_i float32 [n, vocabulary].
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from llama_cpp import Llama


def main() -> None:
    path, out = sys.argv[1:]
    jobs: list[dict[str, Any]] = json.load(sys.stdin)
    # float32 keys and values, so that the weights' type is the only difference between two models.
    llama = Llama(path, n_ctx=512, n_gpu_layers=0, logits_all=True, type_k=0, type_v=0, verbose=False)
    arrays: dict[str, Any] = {}
    for index, job in enumerate(jobs):
        prompt = llama.tokenize(job["text"].encode(), add_bos=False, special=True)
        llama.reset()
        llama.eval(prompt)
        logits = []
        for step in range(job["count"]):
            logits.append(np.array(llama.scores[llama.n_tokens - 1], dtype=np.float32))
            chosen = int(logits[-1].argmax())
            llama.eval([chosen if job["follow"] is None else job["follow"][step]])
        arrays[f"prompt_{index}"] = np.array(prompt)
        arrays[f"logits_{index}"] = np.stack(logits)
        arrays[f"tokens_{index}"] = arrays[f"logits_{index}"].argmax(axis=1)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
