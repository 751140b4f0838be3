"""`ifprune serve`, an HTTP server with OpenAI's and Anthropic's APIs: its options, its start and its end.

stdout carries the one line of `--json` and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import closing
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from . import options
from .console import note, result_json
from .generate import check_exclusive
from .loading import load_model

if TYPE_CHECKING:
    from socket import socket

    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifprune_mlx import Model
    from ifprune_mlx.serving.engine.engine import Engine
    from ifprune_mlx.serving.http.service import Defaults, Service

_KEY = "IFPRUNE_API_KEY"


class LogLevel(str, Enum):
    """How much of what the server does is said on stderr."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


_HOST = "Address to listen on; one that others can reach needs an API key."
HostOption = Annotated[str, typer.Option("--host", help=_HOST)]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
KeyOption = Annotated[
    Optional[str],
    typer.Option("--api-key", metavar="KEY", help=f"What clients must send.  [default: the environment's {_KEY}]"),
]
CorsOption = Annotated[
    Optional[list[str]],
    typer.Option("--cors", metavar="ORIGIN", help="Let web pages of this origin ask, * for all; repeatable."),
]
UiOption = Annotated[bool, typer.Option("--ui", help="Give out a chat page at /.")]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens of an answer, where a request does not say.")
]
ConcurrencyOption = Annotated[
    int, typer.Option("--concurrency", min=1, max=1024, help="Most answers that are computed together.")
]
QueueOption = Annotated[int, typer.Option("--queue", min=1, max=65536, help="Most answers that wait beside them.")]
PromptCacheOption = Annotated[
    str, typer.Option("--prompt-cache-size", metavar="BYTES", help="Memory for prompts read before; 0 keeps none.")
]
MaxBodyOption = Annotated[str, typer.Option("--max-body", metavar="BYTES", help="Largest body of a request.")]
LogLevelOption = Annotated[
    LogLevel, typer.Option("--log-level", case_sensitive=False, help="How much is said on stderr.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object when it listens: url, model, pid.")]


def serve(
    model: options.ModelOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8080,
    api_key: KeyOption = None,
    cors: CorsOption = None,
    ui: UiOption = False,
    max_tokens: MaxTokensOption = 512,
    selector: options.SelectorOption = None,
    select_window: options.SelectWindowOption = None,
    selection_cache: options.SelectionCacheOption = None,
    task: options.TaskOption = None,
    dense: options.DenseOption = False,
    density: options.DensityOption = None,
    active_params: options.ActiveParamsOption = None,
    memory: options.MemoryOption = None,
    residency: options.ResidencyOption = None,
    temp: options.TempOption = 0.0,
    top_p: options.TopPOption = 1.0,
    min_p: options.MinPOption = 0.0,
    top_k: options.TopKOption = 0,
    concurrency: ConcurrencyOption = 8,
    queue: QueueOption = 64,
    prompt_cache_size: PromptCacheOption = "1GB",
    max_body: MaxBodyOption = "10MB",
    dtype: options.DtypeOption = None,
    trust_remote_code: options.TrustOption = False,
    log_level: LogLevelOption = LogLevel.INFO,
    json: JsonOption = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's and Anthropic's clients ask; every request selects its own neurons."""
    _check_installed()
    from ifprune_mlx.serving.engine.engine import Engine
    from ifprune_mlx.serving.engine.request import SamplingParams
    from ifprune_mlx.serving.engine.sampling import check_sampling
    from ifprune_mlx.serving.http.app import make_app
    from ifprune_mlx.serving.http.middleware import Limits
    from ifprune_mlx.serving.http.schemas_requests import SelectionOptions
    from ifprune_mlx.serving.http.server import is_loopback, url
    from ifprune_mlx.serving.http.server import serve as listen
    from ifprune_mlx.serving.http.service import Defaults

    fixed = {"--dense": dense, "--task": task}
    budgets = {"--density": density, "--active-params": active_params}
    check_exclusive({**fixed, "--selector": selector}, {**fixed, **budgets})
    budget = options.Budget(density, active_params, memory).arguments()
    cache_bytes, body_bytes = _bytes(prompt_cache_size, "--prompt-cache-size"), _bytes(max_body, "--max-body")
    sampling = SamplingParams(temperature=temp, top_p=top_p, min_p=min_p, top_k=top_k)
    check_sampling(sampling, None)
    listener, key = _bind(host, port, api_key)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code, residency=residency, memory=budget.pop("memory"))
    options.Selecting(select_window, selection_cache).apply(loaded)
    loaded.keep(**budget)  # a budget that cannot be is found now
    _log(log_level)
    selection = {"task": task, "selector": selector and selector.value, "dense": dense, **budget}
    defaults = Defaults(SelectionOptions.model_validate(selection), sampling, max_tokens)
    engine = Engine(loaded, tokenizer, concurrency=concurrency, queue=queue, prompt_cache_bytes=cache_bytes)
    with closing(engine), closing(_service(model, loaded, tokenizer, engine, defaults, concurrency + queue)) as service:
        limits = Limits(key, is_loopback(listener), host, tuple(cors or ()), body_bytes, concurrency + queue + 64)
        listen(make_app(service, limits, ui=ui), listener, lambda: _announce(service.name, url(listener), json))


def _service(
    model: str | None, loaded: Model, tokenizer: TokenizerWrapper, engine: Engine, defaults: Defaults, answers: int
) -> Service:
    """What is served; raises IfpruneError if a default cannot be."""
    from ifprune_mlx.selection.selectors import make_selector
    from ifprune_mlx.serving.http.service import Service

    name = "SmolLM2-135M-Instruct" if model is None else Path(model).name or Path(model).resolve().name
    aliases = () if model is None else (model,)
    service = Service(loaded, tokenizer, engine, name=name, aliases=aliases, defaults=defaults, most_answers=answers)
    if defaults.selection.task is not None:
        service.load_task(defaults.selection.task)
    elif not defaults.selection.dense:
        make_selector(loaded, defaults.selection.selector)
    return service


def _announce(name: str, url: str, json: bool) -> None:
    note(f"{name} listens on {url}; Ctrl-C ends it")
    if json:
        result_json({"url": url, "model": name, "pid": os.getpid()})


def _bind(host: str, port: int, given_key: str | None) -> tuple[socket, str | None]:
    """The socket to listen on, and the API key; raises IfpruneError if others can reach it and there is no key."""
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.serving.http.server import bind, is_loopback

    key = os.environ.get(_KEY) if given_key is None else given_key
    if key is not None and not key.strip():
        raise IfpruneError(f"the API key is empty; give one with --api-key or {_KEY}, or neither")
    listener = bind(host, port)
    if key is None and not is_loopback(listener):
        listener.close()
        advice = f"give an API key with --api-key or {_KEY}, or listen on 127.0.0.1"
        raise IfpruneError(f"--host {host} can be reached by others; {advice}")
    return listener, key


def _check_installed() -> None:
    """Raise IfpruneError if the packages that serve are not there."""
    from ifprune_mlx import IfpruneError

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise IfpruneError(f"{' and '.join(missing)} missing; install with: pip install 'ifprune-mlx[server]'")


def _bytes(text: str, option: str) -> int:
    from ifprune_mlx.checkpoint.budget import parse_quantity

    return 0 if text.strip() == "0" else parse_quantity(text, option)


def _log(level: LogLevel) -> None:
    """A line for every request, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("ifprune.serve")
    log.handlers, log.propagate = [handler], False
    log.setLevel(level.value)
