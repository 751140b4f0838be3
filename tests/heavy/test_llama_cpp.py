"""SmolLM2 from its GGUF against llama.cpp, the reference for what that file means. Dense, float32, greedy.

llama.cpp quantizes activations to 8 bits where weights are Q4_1, and we compute in float32. Both are therefore held
against llama.cpp on the same weights stored as float32. That run has no such noise: our logits must be its logits, and
our tokens its tokens. How far llama.cpp is from itself, Q4_1 against float32, is the quantization noise; where our
tokens leave those of the Q4_1 run, our two likeliest tokens must be closer together than twice that noise.

`IFPRUNE_LLAMA_CPP_PYTHON` names an interpreter that has llama_cpp; by default it is this one. It runs on its own, since
its OpenMP and BLAS do not share a process with others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import load, stream_generate

pytestmark = pytest.mark.heavy

COUNT = 32
PROMPTS = [
    "Write a Python function that reverses a string.",
    "What is 17 times 23? Explain step by step.",
    "What should I keep in mind when I make a pot of tea?",
    "Name three rivers in Europe and one fact about each.",
    "Rewrite this politely: give me the report now.",
]
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def llama_python() -> str:
    """An interpreter that has llama_cpp."""
    python = os.environ.get("IFPRUNE_LLAMA_CPP_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import llama_cpp"], check=False, capture_output=True, env=_clean())
    if found.returncode:
        pytest.skip("llama_cpp is not installed (pip install llama-cpp-python, or set IFPRUNE_LLAMA_CPP_PYTHON)")
    return python


def _clean() -> dict[str, str]:
    """The environment without what is meant for our own interpreter."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}


def write_float32(source: Path, out: Path) -> None:
    """The same GGUF file with every tensor as float32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(python: str, model: Path, jobs: list[dict[str, Any]], out: Path) -> Any:
    """What `llama_greedy.py` answers."""
    script = Path(__file__).with_name("llama_greedy.py")
    command = [python, str(script), str(model), str(out)]
    subprocess.run(command, check=True, input=json.dumps(jobs).encode(), env=_clean())
    return np.load(out)


def difference(one: Logits, other: Logits) -> float:
    return float(np.abs(one - other).max())


def test_greedy_answers_are_those_of_llama_cpp(llama_python: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    path = convert(open_source(smollm2_gguf), tmp_path / "smollm2", Options(dtype=mx.float32)).checkpoint.path
    model, tokenizer = load(path)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    prompts = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    ours: list[list[int]] = []
    for prompt in prompts:
        answer = stream_generate(model, tokenizer, prompt, dense=True, max_tokens=COUNT)
        ours.append([response.token for response in answer])

    def our_logits(prompt: list[int], tokens: list[int]) -> Logits:
        return np.array(model(mx.array([prompt + tokens]))[0, len(prompt) - 1 : -1])

    jobs = [{"text": text, "follow": None, "count": len(tokens)} for text, tokens in zip(texts, ours, strict=True)]
    quantized = llama(llama_python, smollm2_gguf, jobs, tmp_path / "quantized.npz")
    write_float32(smollm2_gguf, tmp_path / "float32.gguf")
    plain = llama(llama_python, tmp_path / "float32.gguf", jobs, tmp_path / "plain.npz")
    # llama.cpp in float32 on the prefixes of its own Q4_1 run: what quantized activations alone change.
    following = [job | {"follow": quantized[f"tokens_{index}"].tolist()} for index, job in enumerate(jobs)]
    followed = llama(llama_python, tmp_path / "float32.gguf", following, tmp_path / "followed.npz")
    (tmp_path / "float32.gguf").unlink()  # pytest keeps the folder, and this is half a gigabyte

    for index, (prompt, tokens) in enumerate(zip(prompts, ours, strict=True)):
        assert quantized[f"prompt_{index}"].tolist() == prompt
        exact = difference(our_logits(prompt, tokens), plain[f"logits_{index}"])
        assert plain[f"tokens_{index}"].tolist() == tokens
        assert exact < 2e-3

        theirs = quantized[f"tokens_{index}"].tolist()
        noise = difference(followed[f"logits_{index}"], quantized[f"logits_{index}"])
        from_quantized = difference(our_logits(prompt, theirs), quantized[f"logits_{index}"])
        assert from_quantized < noise + 2e-3
        said = f"prompt {index}: {len(tokens)} tokens, from float32 {exact:.1e}, from Q4_1 {from_quantized:.2f}"
        if theirs == tokens:
            print(f"{said}, the same tokens in all three")
            continue
        first = next(at for at, pair in enumerate(zip(theirs, tokens, strict=True)) if pair[0] != pair[1])
        row = our_logits(prompt, tokens)[first]
        gap = float(row[tokens[first]] - row[theirs[first]])
        print(f"{said}, tokens differ from Q4_1's at {first}: gap {gap:.3f}, quantization noise {noise:.3f}")
        assert 0 <= gap < 2 * noise
    model.close()
    shutil.rmtree(path)
