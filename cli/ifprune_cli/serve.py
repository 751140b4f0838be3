"""`ifprune serve`: an HTTP server that speaks OpenAI's and Anthropic's APIs.

What it answers is ifprune_mlx.serving's; this file has its options, its start and its end. stdout carries the one line
of `--json` and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, result_json
from .generate import check_exclusive
from .loading import load_model
from .options import (
    ActiveParamsOption,
    Budget,
    DenseOption,
    DensityOption,
    DtypeOption,
    MemoryOption,
    MinPOption,
    ModelOption,
    ResidencyOption,
    Selecting,
    SelectionCacheOption,
    SelectorOption,
    SelectWindowOption,
    TaskOption,
    TempOption,
    TopKOption,
    TopPOption,
    TrustOption,
)

if TYPE_CHECKING:
    from ifprune_mlx.serving.engine.request import SamplingParams

_KEY_VARIABLE = "IFPRUNE_API_KEY"


class LogLevel(str, Enum):
    """How much of what the server does is said on stderr."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


def serve(
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; one that others can reach needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8080,
    api_key: Annotated[
        Optional[str],
        typer.Option(
            "--api-key", metavar="KEY", help=f"What clients must send.  [default: the environment's {_KEY_VARIABLE}]"
        ),
    ] = None,
    cors: Annotated[
        Optional[list[str]],
        typer.Option("--cors", metavar="ORIGIN", help="Let web pages of this origin ask, * for all; repeatable."),
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Give out a chat page at /.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens of an answer, where a request does not say.")
    ] = 512,
    selector: SelectorOption = None,
    select_window: SelectWindowOption = None,
    selection_cache: SelectionCacheOption = None,
    task: TaskOption = None,
    dense: DenseOption = False,
    density: DensityOption = None,
    active_params: ActiveParamsOption = None,
    memory: MemoryOption = None,
    residency: ResidencyOption = None,
    temp: TempOption = 0.0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    top_k: TopKOption = 0,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=1024, help="Most answers that are computed together.")
    ] = 8,
    queue: Annotated[int, typer.Option("--queue", min=1, max=65536, help="Most answers that wait beside them.")] = 64,
    prompt_cache_size: Annotated[
        str, typer.Option("--prompt-cache-size", metavar="BYTES", help="Memory for prompts read before; 0 keeps none.")
    ] = "1GB",
    max_body: Annotated[str, typer.Option("--max-body", metavar="BYTES", help="Largest body of a request.")] = "10MB",
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", case_sensitive=False, help="How much is said on stderr.")
    ] = LogLevel.INFO,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when it listens: url, model, pid.")
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's and Anthropic's clients ask; every request selects its own neurons."""
    from ifprune_mlx import IfpruneError

    _check_installed()
    fixed = {"--dense": dense, "--task": task}
    check_exclusive(
        {**fixed, "--selector": selector},
        {**fixed, "--density": density, "--active-params": active_params},
    )
    key = os.environ.get(_KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not key.strip():
        raise IfpruneError(f"the API key is empty; give one with --api-key or {_KEY_VARIABLE}, or neither")
    budget = Budget(density, active_params, memory).arguments()
    cache_bytes = _bytes(prompt_cache_size, "--prompt-cache-size")
    body_bytes = _bytes(max_body, "--max-body")
    sampling = _sampling(temp, top_p, min_p, top_k)

    from ifprune_mlx.serving.http.server import bind, is_loopback, url
    from ifprune_mlx.serving.http.server import serve as listen

    listener = bind(host, port)
    if key is None and not is_loopback(listener):
        listener.close()
        raise IfpruneError(
            f"--host {host} can be reached by others; give an API key with --api-key or {_KEY_VARIABLE}, "
            "or listen on 127.0.0.1"
        )
    loaded, tokenizer = load_model(model, dtype, trust_remote_code, residency=residency, memory=budget["memory"])
    Selecting(select_window, selection_cache).apply(loaded)
    loaded.keep(budget["density"], budget["active_parameters"])  # a budget that cannot be is found now

    from ifprune_mlx.serving.engine.engine import Engine
    from ifprune_mlx.serving.http.app import make_app
    from ifprune_mlx.serving.http.middleware import Limits
    from ifprune_mlx.serving.http.schemas_requests import SelectionOptions
    from ifprune_mlx.serving.http.service import Defaults, Service

    selection = SelectionOptions(
        task=task,
        selector=None if selector is None else selector.value,
        dense=dense,
        density=budget["density"],
        active_parameters=budget["active_parameters"],
    )
    name = "SmolLM2-135M-Instruct" if model is None else Path(model).name or Path(model).resolve().name
    engine = Engine(loaded, tokenizer, concurrency=concurrency, queue=queue, prompt_cache_bytes=cache_bytes)
    service = Service(
        loaded,
        tokenizer,
        engine,
        name=name,
        aliases=() if model is None else (model,),
        defaults=Defaults(selection, sampling, max_tokens),
        most_answers=concurrency + queue,
    )
    limits = Limits(
        api_key=key,
        loopback=is_loopback(listener),
        host=host,
        origins=tuple(cors or ()),
        max_body=body_bytes,
        requests=concurrency + queue + 64,
    )
    _log(log_level)

    def ready() -> None:
        note(f"{name} listens on {url(listener)}; Ctrl-C ends it")
        if json:
            result_json({"url": url(listener), "model": name, "pid": os.getpid()})

    try:
        if task is not None:
            service.load_task(task)  # one that is not there is found now
        from ifprune_mlx.selection.selectors import make_selector

        if task is None and not dense:
            make_selector(loaded, selection.selector)
        listen(make_app(service, limits, ui=ui), listener, ready)
    finally:
        engine.close()
        service.close()


def _sampling(temp: float, top_p: float, min_p: float, top_k: int) -> SamplingParams:
    """How tokens are drawn for requests that do not say.

    Raises:
        IfpruneError: if an option is out of range.
    """
    from ifprune_mlx.serving.engine.request import SamplingParams
    from ifprune_mlx.serving.engine.sampling import check_sampling

    sampling = SamplingParams(temperature=temp, top_p=top_p, min_p=min_p, top_k=top_k)
    check_sampling(sampling, None)
    return sampling


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
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(level.value)
