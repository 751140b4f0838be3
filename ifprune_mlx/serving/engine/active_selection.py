"""The selection that jobs are computed under: which it is, since when, and making another one active.

For the worker alone.
"""

from __future__ import annotations

import time

from ifprune_mlx.errors import CheckpointError
from ifprune_mlx.model import Model
from ifprune_mlx.prompt_cache import DENSE
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.serving.engine.request import GenerationFailedError
from ifprune_mlx.serving.engine.request_state import RequestState, owner_of, reason_of
from ifprune_mlx.serving.engine.request_table import RequestTable


class ActiveSelection:
    """The live selection of one model.

    Attributes:
        active: what jobs are, or were last, computed under; None is dense.
        owner: that of `active`, or ALONE.
        since: when `owner` became so, by `time.monotonic`.
    """

    def __init__(self, model: Model, books: RequestTable) -> None:
        self._model, self._books = model, books
        self.active: Selection | None = None
        self.owner, self.since = DENSE, 0.0
        self._certain = False  # False when a switch or a call has failed: who knows what is active then

    def resume(self) -> None:
        """Begin with what is active now, if others have used the model meanwhile."""
        if owner_of(self.active) != owner_of(self._model.selection):
            self.active = self._model.selection
            self.owner = owner_of(self.active)

    def distrust(self) -> None:
        """Something failed: the next job's switch is made whatever seems to be active."""
        self._certain = False

    def restore(self) -> None:
        """Make `active` active again, if a predictor that reads with the model's own layers has left it dense."""
        if owner_of(self._model.selection) != owner_of(self.active):
            self._model.switch(self.active)

    def holds(self, ticket: RequestState) -> bool:
        """Whether what is active is for certain the ticket's selection."""
        return self._certain and owner_of(self._model.selection) == owner_of(ticket.selection)

    def stays(self, owner: str) -> bool:
        """Whether `owner` is the live one for certain. If not, nothing may run any more when it is switched to."""
        return self._certain and owner == self.owner

    def switch(self, ticket: RequestState, owner: str) -> None:
        """Make a ticket's selection active, if it is not; `owner` is then the live one.

        Raises:
            GenerationFailedError: if that fails through no fault of the job.
        """
        before = self.active
        if not self.stays(owner):
            self.owner, self.since = owner, time.monotonic()
        if self.holds(ticket):
            return
        self._certain = False
        try:
            ticket.switch_s = self._model.switch(ticket.selection).seconds
        except CheckpointError as exc:  # an earlier switch was cut off: no job is at fault
            raise GenerationFailedError(f"the model failed ({reason_of(exc)})") from exc
        self._certain, self.active = True, ticket.selection
        if owner_of(before) != owner_of(ticket.selection):
            self._books.switched()
            if before is not None and ticket.selection is not None:
                ticket.overlap = ticket.selection.overlap(before)
