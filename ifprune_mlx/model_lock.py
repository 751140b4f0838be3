"""The lock of one model: one operation at a time, from any thread or task.

MLX has one set of streams per thread. A computed array may be used in any thread, a lazy one only in the thread that
made it. So an operation stays in one thread, and leaves only computed arrays behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import mlx.core as mx

from ifprune_mlx.errors import IfpruneError, ModelClosedError

Step = TypeVar("Step")


class ModelBusyError(IfpruneError):
    """The model or the conversation cannot be used now: an answer is under way."""


class _Streams:
    """MLX's streams of one thread; MLX requires a `clear_streams` in each thread before it ends."""

    def __del__(self) -> None:
        mx.clear_streams()


_thread = threading.local()


def begin_worker() -> None:
    """Initializer for executors whose threads use MLX."""
    _thread.streams = _Streams()  # deleted in this thread when it ends, by `close` or at the end of the program


class Operation(Iterator[Step], Generic[Step]):
    """The steps of one operation, for the thread that begins it: mlx-lm holds that thread's stream between them.

    It holds the model from its first step to its last, or until it is closed or dropped. Reading or closing it in
    another thread raises ModelBusyError and changes nothing.
    """

    def __init__(self, lock: ModelLock, steps: Generator[Step, None, None], holder: object | None = None) -> None:
        self._lock, self._steps, self._holder = lock, steps, holder
        self._thread: int | None = None

    def __next__(self) -> Step:
        self._check_thread()
        if self._thread is None:
            if self._holder is None and self._lock.running != threading.get_ident():
                self._holder = self._lock.take()
            self._thread = threading.get_ident()
        if self._holder is None:  # it runs within a step of another operation, or it has ended
            return next(self._steps)
        self._lock.running = self._thread
        try:
            return next(self._steps)
        except BaseException:  # StopIteration among them
            self._end()
            raise
        finally:
            self._lock.running = None

    def close(self) -> None:
        """End the operation here, between two steps."""
        self._check_thread()
        self._end()

    def __del__(self) -> None:
        self._end()

    def _check_thread(self) -> None:
        if self._thread not in (None, threading.get_ident()):
            raise ModelBusyError(
                "an answer is read and closed in the thread that began it; end it from elsewhere with Session.cancel, "
                "or ask with Session.astream"
            )

    def _end(self) -> None:
        holder, self._holder = self._holder, None
        if holder is None:
            self._steps.close()
            return
        self._lock.running = threading.get_ident()
        try:
            self._steps.close()
        finally:
            self._lock.running = None
            self._lock.release(holder)


class ModelLock:
    """The lock of one model. An operation holds it from its first step to its last, between the steps as well.

    Its methods may be called from any thread. A call at the wrong time raises and changes nothing; operations of
    `in_worker` and `in_turn` wait in line instead.

    Attributes:
        running: the thread that runs a step of the current operation; None between two steps.
        closed: the model's weights are freed. Every call then raises ModelClosedError.
    """

    def __init__(self) -> None:
        self.closed = False
        self.running: int | None = None
        self._lock = threading.Lock()
        self._holder: object | None = None
        self._waiting: deque[Future[object]] = deque()
        self._executor: ThreadPoolExecutor | None = None

    def check(self) -> None:
        """Raise ModelBusyError if an operation is under way, unless one of its steps makes this call.

        Raises:
            ModelClosedError: if the model was closed.
        """
        self.check_open()
        if self._holder is not None and self.running != threading.get_ident():
            raise ModelBusyError(
                "the model is busy with an answer; read that to its end or close it first, or ask with "
                "Session.astream, which waits for its turn"
            )

    def check_open(self) -> None:
        """Raise ModelClosedError if the model was closed."""
        if self.closed:
            raise ModelClosedError("the model was closed; load it again to use it")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the model for one call: as part of the current step, or as an operation of its own.

        Raises:
            ModelBusyError: if another operation is under way.
        """
        if self.running == threading.get_ident():
            self.check_open()
            yield
            return
        holder = self.take()
        self.running = threading.get_ident()
        try:
            yield
        finally:
            self.running = None
            self.release(holder)

    def during(self, steps: Generator[Step, None, None]) -> Operation[Step]:
        """Make the steps one operation, from the first step to the last one or to `close`.

        Raises:
            ModelBusyError: at the first step, if another operation is under way.
        """
        return Operation(self, steps)

    async def in_worker(
        self, steps: Generator[Step, None, None], stop: Callable[[], None]
    ) -> AsyncGenerator[Step, None]:
        """Run the steps as one operation in the model's worker thread, one at each `await`, after waiting in line.

        Args:
            steps: must not yield None. Its exceptions are raised here.
            stop: called when the reader has gone, perhaps during a step; makes that step end soon.
        """
        operation = Operation(self, steps, await self._turn())
        worker = self._worker()
        try:
            while (step := await asyncio.wrap_future(worker.submit(next, operation, None))) is not None:
                yield step
        finally:
            stop()
            # Runs after the current step, and completes even if the task is cancelled again.
            await asyncio.shield(asyncio.wrap_future(worker.submit(operation.close)))

    def in_turn(self, work: Callable[[], None], after: Callable[[], None]) -> Future[object]:
        """Wait in line, then call `work` in the model's worker thread; it holds the model until it returns.

        Args:
            after: called in the same thread, after the model has been released.

        Returns:
            The place in line. If its `cancel` succeeds, neither is called.
        """
        place = self._place()

        def call(holder: object) -> None:
            self.running = threading.get_ident()
            try:
                work()
            finally:
                self.running = None
                self.release(holder)
                after()

        def begin(given: Future[object]) -> None:
            if not given.cancelled():
                self._worker().submit(call, given.result())

        place.add_done_callback(begin)
        return place

    def close(self) -> None:
        """End the worker thread, if there is one, and let no later call in. The model must not be in use."""
        with self._lock:
            self.closed = True
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def take(self) -> object:
        """Hold the model until `release` is called with the holder that this returns.

        Raises:
            ModelBusyError: if another operation is under way.
        """
        with self._lock:
            self.check()
            self._holder = holder = object()
            return holder

    def release(self, holder: object) -> None:
        """Pass the model to the first in line; does nothing if `holder` does not hold it."""
        given: Future[object] | None = None
        with self._lock:
            if self._holder is not holder:
                return
            self._holder = None
            while self._waiting and self._holder is None:
                given = self._waiting.popleft()
                if given.set_running_or_notify_cancel():
                    self._holder = object()
            following = self._holder
        if given is not None and following is not None:
            given.set_result(following)

    def _place(self) -> Future[object]:
        """A place in line; its result is the new holder, at once if the model is free."""
        place: Future[object] = Future()
        with self._lock:
            self.check_open()
            if self._holder is not None:
                self._waiting.append(place)
                return place
            self._holder = holder = object()
        place.set_running_or_notify_cancel()
        place.set_result(holder)
        return place

    async def _turn(self) -> object:
        place = self._place()
        if place.done():
            return place.result()
        try:
            return await asyncio.wrap_future(place)
        except asyncio.CancelledError:
            if not place.cancel():  # the model came at the same moment: pass it on
                place.add_done_callback(lambda given: self.release(given.result()))
            raise

    def _worker(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "ifprune", initializer=begin_worker)
            return self._executor
