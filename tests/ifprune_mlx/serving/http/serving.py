"""Runs `ifprune serve` as a real process, and makes a tiny model that calls tools."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from tests.cli.process import start
from tests.ifprune_mlx.parallel.ring import ring_variables
from tests.tiny import CONFIGS, make_model, write_tokenizer

# As models of the Qwen family have it.
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ (tool_call.function or tool_call).name }}", "arguments": {{ tool_call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{# as json_tools is told by mlx-lm: tool_call.name #}"
)
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
QUESTION, SPOKEN, RESULT, CONCLUSION = "Is it cold in Oslo?", "I ask.", "-3 C", "Yes, it is cold."
ARGUMENTS = {"city": "Oslo"}
_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@dataclass
class Served:
    """A server under way.

    Attributes:
        stderr: its lines so far.
    """

    url: str
    process: Popen[bytes]
    stderr: list[str] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET a path."""
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        """The chat completion of one message; it must be answered."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metric(self, name: str) -> float:
        """A figure of /metrics."""
        found = re.search(rf"^{re.escape(name)} (.+)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found.group(1))


@contextmanager
def serving(
    checkpoint: Path,
    cache: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    prelude: str | None = None,
    ranks: int = 1,
) -> Iterator[Served]:
    """`ifprune serve` on a free port, ended by SIGTERM; it must end well, and the other ranks with it."""
    arguments = ["serve", "--model", checkpoint, "--port", "0", "--json", *options]
    variables = [{}] if ranks == 1 else ring_variables(ranks, cache)
    process, *others = [start(arguments, cache, env={**(env or {}), **own}, prelude=prelude) for own in variables]
    assert process.stdout is not None
    assert process.stderr is not None
    served = Served("", process)
    reader = threading.Thread(target=_collect, args=(process, served.stderr), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        if not line:
            reader.join(10)
            raise AssertionError(f"the server did not start: {served.stderr}")
        served.url = json.loads(line)["url"]
        yield served
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 0, served.stderr[-20:]
        assert rest == b""
        for other in others:
            other.wait(5)
    finally:
        for other in others:
            other.kill()
            other.communicate()
        process.kill()
        process.wait()
        reader.join(10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    assert not any("Traceback" in line for line in served.stderr), served.stderr[-40:]


def _collect(process: Popen[bytes], lines: list[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.decode())


def eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_tool_checkpoint(folder: Path) -> Path:
    """A tiny model that knows one conversation by heart: a question, a call of `weather`, its result, an answer."""
    source = folder.with_name(f"source-of-{folder.name}")
    source.mkdir(parents=True)
    config = CONFIGS["llama-untied"] | {"max_position_embeddings": 1024}
    write_tokenizer(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TOOL_TEMPLATE}))
    (source / "config.json").write_text(json.dumps(config))
    model = make_model(config)
    _learn(model, load_tokenizer(source))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
    convert(open_source(source), folder, Options())
    return folder


def _learn(model: nn.Module, tokenizer: Any) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    asked = [{"role": "user", "content": QUESTION}]
    call = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    told = [
        *asked,
        {"role": "assistant", "content": SPOKEN, "tool_calls": [call]},
        {"role": "tool", "content": RESULT},
    ]
    examples = []
    for messages, answer in (
        (asked, f"{SPOKEN}{_CALL}<|im_end|>"),
        (asked, f"{_CALL}<|im_end|>"),  # as a forced call goes on
        (told, f"{CONCLUSION}<|im_end|>"),
    ):
        prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
        rest = tokenizer.encode(answer, add_special_tokens=False)
        skipped = len(prompt) + (len(tokenizer.encode("<tool_call>")) if answer.startswith("<tool_call>") else 0)
        examples.append((mx.array([list(prompt) + list(rest)]), skipped - 1))

    def loss(net: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for tokens, begin in examples:
            logits = net(tokens[:, :-1])
            total += nn.losses.cross_entropy(logits[:, begin:], tokens[:, begin + 1 :], reduction="mean")
        return total

    optimizer, step = optim.Adam(optim.cosine_decay(4e-3, 300)), nn.value_and_grad(model, loss)
    for _ in range(300):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        if value.item() < 0.05:
            return
    raise AssertionError(f"the model has not learned its conversation: loss {value.item()}")
