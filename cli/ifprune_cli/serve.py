"""`ifprune serve`, an HTTP server with OpenAI's and Anthropic's APIs: its options, its start and its end.

stdout carries the one line of `--json` and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import webbrowser
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.util import find_spec
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from . import options
from .console import note, printable, result_json
from .loading import Runtime, open_runtime
from .ranks import leads

if TYPE_CHECKING:
    from socket import socket

    from ifprune_mlx.serving.engine.engine import Engine
    from ifprune_mlx.serving.engine.request import SamplingParams
    from ifprune_mlx.serving.http.service import Service

_KEY = "IFPRUNE_API_KEY"
_server, _requests = (partial(typer.Option, rich_help_panel=heading) for heading in ("Server", "Requests"))


class LogLevel(str, Enum):
    """How much of what the server does is said on stderr."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


@dataclass(frozen=True)
class _Server:
    """Where the server listens, and who may ask."""

    host: Annotated[
        str, _server("--host", help="Listen on this address. One that others can reach needs an API key.")
    ] = "127.0.0.1"
    port: Annotated[int, _server("--port", min=0, max=65535, help="Listen on this port; 0 takes a free one.")] = 8080
    api_key: Annotated[
        Optional[str],
        _server("--api-key", metavar="KEY", help=f"Let only clients in that send this.  [default: {_KEY}'s value]"),
    ] = None
    cors: Annotated[
        Optional[list[str]],
        _server("--cors", metavar="ORIGIN", help="Let web pages of this origin ask, * for all; repeatable."),
    ] = None
    alias: Annotated[
        Optional[list[str]],
        _server("--alias", metavar="NAME", help="Let clients ask for the model by this name, too; repeatable."),
    ] = None
    any_model: Annotated[
        bool, _server("--any-model", help="Let clients ask for any model; this one answers them all.")
    ] = False
    ui: Annotated[bool, _server("--ui", help="Serve a chat page at /.")] = False
    open: Annotated[bool, _server("--open", help="Serve the chat page, and open it in the browser.")] = False
    max_body: Annotated[str, _server("--max-body", metavar="BYTES", help="Refuse requests with a larger body.")] = (
        "10MB"
    )
    log_level: Annotated[LogLevel, _server("--log-level", case_sensitive=False, help="Say this much on stderr.")] = (
        LogLevel.INFO
    )

    def bind(self) -> tuple[socket, str | None]:
        """The socket to listen on, and the API key.

        Raises:
            IfpruneError: if others can reach it and there is no key, or the address cannot be had.
        """
        from ifprune_mlx import IfpruneError
        from ifprune_mlx.serving.http.server import bind, is_loopback

        key = os.environ.get(_KEY) if self.api_key is None else self.api_key
        if key is not None and not key.strip():
            raise IfpruneError(f"the API key is empty; give one with --api-key or {_KEY}, or neither")
        listener = bind(self.host, self.port)
        if key is None and not is_loopback(listener):
            listener.close()
            advice = f"give an API key with --api-key or {_KEY}, or listen on 127.0.0.1"
            raise IfpruneError(f"--host {self.host} can be reached by others; {advice}")
        return listener, key


@dataclass(frozen=True)
class _Requests:
    """What holds for all requests, and for those that do not say."""

    max_tokens: Annotated[
        int, _requests("--max-tokens", "-m", min=1, help="Generate at most this many tokens, unless a request says.")
    ] = 512
    temp: options.TempOption = 0.0
    top_p: options.TopPOption = 1.0
    min_p: options.MinPOption = 0.0
    top_k: options.TopKOption = 0
    policy: Annotated[
        Optional[Literal["first", "turn", "auto", "system"]],
        options.selection_option(
            "--policy",
            help="Select by the first user message, by the last one, by the last one where the topic changes, or by the"
            " system prompt and the tools' names: then the long prompt of an agent is read once.  [default: first]",
        ),
    ] = None
    concurrency: Annotated[
        int, _requests("--concurrency", min=1, max=1024, help="Compute at most this many answers together.")
    ] = 8
    queue: Annotated[
        int, _requests("--queue", min=1, max=65536, help="Let at most this many answers wait beside them.")
    ] = 64
    ignore_chat_template: options.IgnoreTemplateOption = False
    prompt_cache_size: Annotated[
        str, _requests("--prompt-cache-size", metavar="BYTES", help="Keep prompts that were read; 0 keeps none.")
    ] = "1GB"

    @property
    def most_answers(self) -> int:
        """Answers that are computed or wait."""
        return self.concurrency + self.queue


def serve(
    model: options.ModelOptions,
    server: _Server,
    requests: _Requests,
    budget: options.Budget,
    selecting: options.Selecting,
    selector: options.SelectorOption = None,
    task: options.TaskOption = None,
    dense: options.DenseOption = False,
    json: Annotated[
        bool, options.output_option("--json", help="Print one JSON object when it listens: url, model, pid.")
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's and Anthropic's clients ask; every request selects its own neurons."""
    _check_installed()
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.serving.engine.engine import Engine
    from ifprune_mlx.serving.engine.request import SamplingParams
    from ifprune_mlx.serving.engine.sampling import check_sampling
    from ifprune_mlx.serving.http.app import make_app
    from ifprune_mlx.serving.http.middleware import Limits
    from ifprune_mlx.serving.http.server import is_loopback, url
    from ifprune_mlx.serving.http.server import serve as listen

    choice = options.SelectionOptions(selector, task=task, dense=dense)
    choice.check_exclusive(budget)
    policy = {"--policy": requests.policy}
    options.check_exclusive({"--task": task, **policy}, {"--dense": dense, **policy})
    body_bytes = _bytes(server.max_body, "--max-body")
    cache_bytes = _bytes(requests.prompt_cache_size, "--prompt-cache-size")
    sampling = SamplingParams(requests.temp, requests.top_p, requests.top_k, requests.min_p)
    check_sampling(sampling, None)
    budget.arguments()  # a quantity that cannot be read is found before the socket is taken
    if "" in (server.alias or ()):
        raise IfpruneError("--alias is empty; give a name")
    if not leads():
        _follow(model, budget, selecting, choice, requests)
        return
    listener, key = server.bind()
    runtime = open_runtime(model, choice, budget, selecting, template=not requests.ignore_chat_template)
    _log(server.log_level)
    most = requests.most_answers
    engine = Engine(
        runtime.model,
        runtime.tokenizer,
        concurrency=requests.concurrency,
        queue=requests.queue,
        prompt_cache_bytes=cache_bytes,
    )
    with closing(engine), closing(_service(runtime, engine, model, server, task, sampling, requests)) as service:
        origins = tuple(server.cors or ())
        limits = Limits(key, is_loopback(listener), server.host, origins, body_bytes, most + 64)
        app = make_app(service, limits, ui=server.ui or server.open)
        listen(app, listener, lambda: _announce(service.name, url(listener), server, json), engine.close)


def _follow(
    model: options.ModelOptions,
    budget: options.Budget,
    selecting: options.Selecting,
    choice: options.SelectionOptions,
    requests: _Requests,
) -> None:
    """Compute rank 0's answers with it, until it ends."""
    from ifprune_mlx.serving.engine.engine import Engine

    runtime = open_runtime(model, choice, budget, selecting, template=not requests.ignore_chat_template)
    Engine(runtime.model, runtime.tokenizer, concurrency=requests.concurrency).follow()


def _service(
    runtime: Runtime,
    engine: Engine,
    model: options.ModelOptions,
    server: _Server,
    task: str | None,
    sampling: SamplingParams,
    requests: _Requests,
) -> Service:
    """What is served; raises IfpruneError if a default cannot be."""
    from ifprune_mlx.selection.selectors import make_selector
    from ifprune_mlx.serving.http.schemas_requests import SelectionOptions
    from ifprune_mlx.serving.http.service import Defaults, Service

    budget = {name: runtime.budget[name] for name in ("density", "active_parameters")}
    runtime.model.keep(**budget)  # a budget that cannot be is found now
    if task is None and not runtime.dense:
        make_selector(runtime.model, runtime.selector)
    chosen = {"task": task, "selector": runtime.selector, "dense": runtime.dense, "policy": requests.policy, **budget}
    return Service(
        runtime.model,
        runtime.tokenizer,
        engine,
        name=runtime.name,
        aliases=server.alias or (),
        path=model.model,
        any_model=server.any_model,
        defaults=Defaults(SelectionOptions.model_validate(chosen), sampling, requests.max_tokens),
        most_answers=requests.most_answers,
    )


def _announce(name: str, url: str, server: _Server, json: bool) -> None:
    # Browsers do not all know the addresses that stand for every one of this machine's.
    page = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:") + "/"
    chat = f", chat at {page}" if server.ui or server.open else ""
    note(f"{name} listens on {url} (clients: {url}/v1){chat}; Ctrl-C ends it")
    if json:
        result_json({"url": url, "model": name, "pid": os.getpid()})
    if server.open:
        Thread(target=_open, args=(page,), daemon=True).start()  # some browsers return when they are closed


def _open(page: str) -> None:
    if not webbrowser.open(page):
        note(f"no browser could be opened; open {page} yourself")


def _check_installed() -> None:
    """Raise IfpruneError if the packages that serve are not there."""
    from ifprune_mlx import IfpruneError

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise IfpruneError(f"{' and '.join(missing)} missing; install with: pip install 'ifprune-mlx[server]'")


def _bytes(text: str, option: str) -> int:
    from ifprune_mlx.checkpoint.budget import parse_quantity

    return 0 if text.strip() == "0" else parse_quantity(text, option)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _log(level: LogLevel) -> None:
    """A line for every request, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("ifprune_mlx.serving")
    log.handlers, log.propagate = [handler], False
    log.setLevel(level.value)
