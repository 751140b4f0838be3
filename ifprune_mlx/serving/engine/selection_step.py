"""What a job is computed under: its selection is found before its turn comes, or with the reading of its prompt."""

from __future__ import annotations

import time
from collections.abc import Callable

from ifprune_mlx.checkpoint.budget import SSD
from ifprune_mlx.errors import BudgetError
from ifprune_mlx.model import Model
from ifprune_mlx.prompt_cache import DENSE, History
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import Instruction, default_selector, make_selector
from ifprune_mlx.serving.engine.request import EngineClosedError
from ifprune_mlx.serving.engine.request_state import RequestState
from ifprune_mlx.serving.engine.scheduler import ALONE
from ifprune_mlx.session import SWITCH_BELOW

_ACTIVATION = "activation"


def choose(model: Model, ticket: RequestState, live: Selection | None) -> None:
    """Give a ticket its owner, and its selection unless `read_densely` is to find that. May leave the model dense.

    Args:
        live: the selection that jobs are computed under; the policy `auto` may keep it.

    Raises:
        IfpruneError: if the job cannot have what it chooses.
    """
    choice = ticket.job.choice
    if choice.selection is not None:
        model.check(choice.selection)
        ticket.selection, ticket.owner = choice.selection, choice.selection.hash
        return
    name = choice.selector or default_selector(model)
    keep = model.keep(choice.density, choice.active_parameters)
    if choice.dense or name == _ACTIVATION:
        if model.residency == SSD:
            raise BudgetError("not all neurons are in memory; load the model with residency ram to use it dense")
        # `activation` reads the prompt to select, and is to be answered from what it has read.
        ticket.owner = DENSE if choice.dense else ALONE
        return
    start = time.monotonic()
    selected = make_selector(model, name).select(Instruction(ticket.job.instruction, ticket.job.tokens), keep)
    ticket.selection = selected.selection
    stays = live if choice.policy == "auto" and live is not None and live.keep == keep else None
    if stays is not None and ticket.selection.agreement(stays) >= SWITCH_BELOW:
        ticket.selection = stays
    ticket.select_s = time.monotonic() - start
    ticket.owner = ticket.selection.hash


def read_densely(model: Model, ticket: RequestState, given_up: Callable[[], bool]) -> History:
    """The activation selector's dense reading of the prompt, which finds the ticket's selection.

    Args:
        given_up: asked on the way; True ends it.

    Raises:
        EngineClosedError: if it was given up.
    """
    choice, job = ticket.job.choice, ticket.job

    def check(done: int, total: int) -> None:
        if given_up():
            raise EngineClosedError

    start = time.monotonic()
    keep = model.keep(choice.density, choice.active_parameters)
    instruction = Instruction(job.instruction, job.tokens, History.empty(model), check)
    selected = make_selector(model, _ACTIVATION).select(instruction, keep)
    ticket.selection = selected.selection
    ticket.select_s = time.monotonic() - start
    assert selected.history is not None
    return selected.history
