"""The engine: one thread that owns the device, as the others see it; ``loop.py`` is what it does.

Other threads only put work into its inbox and wait for futures. What the engine does not know:
HTTP, image formats, where files come from, and what a model is (that is the runner's).

Every accepted request ends exactly once: with a result, or with a typed error.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial

import structlog

from experimance_controlnet.engine.batcher import Batcher, NewBatchPolicy
from experimance_controlnet.engine.faults import as_worker_error
from experimance_controlnet.engine.loading import Loading, LoadTotal
from experimance_controlnet.engine.loop import EngineLoop, Inbox, in_short
from experimance_controlnet.engine.request import (
    Asset,
    AssetKind,
    GenerationRequest,
    ProgressListener,
)
from experimance_controlnet.engine.runner import GpuMemory, LoadSource, Runner
from experimance_controlnet.engine.tickets import Ledger, Ticket
from experimance_controlnet.errors import DrainingError, EngineDeadError, WorkerError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A model, ControlNet or LoRA on its way."""

    kind: AssetKind
    name: str
    source: LoadSource
    seconds: float | None
    """Since it was begun; None: it waits for its turn, or for room."""
    share: float | None
    """0..1: how much of it is there, about; None where that is not known."""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """What a health check may know; reading it never waits for the device."""

    alive: bool
    hung: bool
    """Busy, and no heartbeat for longer than the watchdog allows."""
    draining: bool
    models_loaded: tuple[str, ...]
    models_parked: tuple[str, ...]
    """They come back without the disk."""
    models_loading: tuple[str, ...]
    loading: tuple[LoadProgress, ...]
    """These and all else that is on its way to the device, in order."""
    queue_depth: int
    """Images accepted and not finished."""
    queue_workload: float
    last_error: str | None


class Engine:
    """Accepts requests from any thread and makes their images on its own."""

    def __init__(
        self,
        runner: Runner,
        *,
        queue_capacity: int,
        max_rows: int,
        new_batcher: NewBatchPolicy = Batcher,
        watchdog_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        on_start: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """``queue_capacity`` in images, ``max_rows`` in UNet rows a batch. ``new_batcher`` makes
        what decides who runs next.

        Both callbacks run on the engine's thread: ``on_start`` first, for as long as it likes, and
        requests are accepted meanwhile; ``on_death`` when an error, one of ``on_start`` included,
        ends the engine for good.
        """
        self._runner = runner
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._on_start = on_start
        self._on_death = on_death
        self._ledger = Ledger(queue_capacity)
        self._inbox: Inbox = queue.SimpleQueue()
        self._loop = EngineLoop(runner, self._ledger, self._inbox, clock, max_rows, new_batcher)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

        # Written by one thread, read by others; each is one reference, so no lock is needed.
        self._alive = True
        self._draining = False
        self._death: str | None = None  # why it is not alive
        self._promises: set[Future[None]] = set()
        self._stopping = False

    # ---- any thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(
        self, requests: Sequence[GenerationRequest], on_progress: ProgressListener | None = None
    ) -> list[Ticket]:
        """Accept all of the requests or none.

        Raises:
            QueueFullError, DrainingError, EngineDeadError: nothing was accepted.
        """
        accepted_s = self._clock()
        tickets = [Ticket(request, accepted_s, on_progress) for request in requests]
        self._ledger.open(tickets)
        for ticket in tickets:
            self._inbox.put(partial(self._loop.admit, ticket))
        return tickets

    def check_room(self, images: int) -> None:
        """Ask before costly preparations: raises what :meth:`submit` would raise right now.

        Raises:
            QueueFullError, DrainingError, EngineDeadError
        """
        self._ledger.check_room(images)

    def abort(self, ticket: Ticket) -> None:
        """End a request at its next step boundary; without effect where it has ended already."""
        self._inbox.put(partial(self._loop.drop, ticket))

    def load(self, model: str) -> Future[None]:
        """Bring a model into memory. The future fails with the reason why it cannot be.

        Raises:
            DrainingError, EngineDeadError
        """
        return self._promise(lambda done: self._loop.load(model, partial(_settle, done)))

    def unload(self, model: str) -> Future[None]:
        """Free a model. The future fails with ModelBusyError where requests use it.

        Raises:
            DrainingError, EngineDeadError
        """
        return self._promise(lambda done: self._loop.unload(model, partial(_settle, done)))

    def health(self) -> EngineHealth:
        """A snapshot."""
        tickets = self._ledger.tickets()
        silent_s = self._clock() - self._loop.beat_s
        return EngineHealth(
            alive=self._alive,
            hung=bool(tickets) and silent_s > self._watchdog_s,
            draining=self._draining,
            models_loaded=self._runner.loaded_models,
            models_parked=self._runner.parked_models,
            models_loading=self._loop.loads.models,
            loading=tuple(map(self._progress, self._loop.loads.under_way)),
            queue_depth=len(tickets),
            queue_workload=sum(ticket.request.workload for ticket in tickets),
            last_error=self._death or self._loop.last_error,
        )

    def holds(self, kind: AssetKind, name: str) -> bool:
        """Whether it is in memory: of a LoRA, for one of the models that are. A snapshot."""
        models = self._runner.loaded_models
        if kind == "model":
            return name in models
        if kind == "controlnet":
            return self._runner.has(Asset(kind, name))
        return any(self._runner.has(Asset(kind, name, model)) for model in models)

    def _progress(self, loading: Loading) -> LoadProgress:
        kind, name, source = loading.asset.kind, loading.asset.name, loading.source
        if loading.begun_s is None:
            return LoadProgress(kind, name, source, None, None)
        seconds = self._clock() - loading.begun_s
        return LoadProgress(kind, name, source, seconds, self._runner.load_share)

    def model_loads(self) -> dict[tuple[str, LoadSource], LoadTotal]:
        """How often each model was brought from where, and how long that took."""
        return dict(self._loop.loads.totals)

    @property
    def device_name(self) -> str:
        """For people."""
        return self._runner.device_name

    @property
    def precision(self) -> str:
        """What models are computed in."""
        return self._runner.precision

    @property
    def memory_tier(self) -> str:
        """How much of a model stays on the device."""
        return self._runner.memory_tier

    def gpu_memory(self) -> GpuMemory | None:
        """None without a GPU."""
        return self._runner.gpu_memory()

    def drain(self) -> None:
        """Accept nothing more; what was accepted goes on."""
        self._draining = True
        if self._alive:
            self._ledger.refuse(
                DrainingError("The server is stopping; send the request to another one.")
            )

    def give_up(self, reason: str) -> None:
        """Declare the engine dead from outside, when it hangs: everything that waits ends with
        EngineDeadError. The thread itself cannot be ended; the process should exit.
        """
        self._die(reason)

    def stop(self, timeout_s: float) -> bool:
        """Drain, wait for what was accepted, end the thread. False where the time did not suffice:
        what was left ended with DrainingError.
        """
        self.drain()
        deadline_s = self._clock() + timeout_s
        while self._thread.is_alive() and len(self._ledger) and self._clock() < deadline_s:
            time.sleep(0.01)
        drained = not len(self._ledger)
        self._inbox.put(self._stop)
        # before the join: who waits should not wait for a last step that nobody wants
        self._end_all(DrainingError("The server stopped before this image was finished."))
        if self._thread.ident is not None:
            self._thread.join(timeout=1.0)
        return drained

    def _promise(self, work: Callable[[Future[None]], None]) -> Future[None]:
        """Ask the engine's thread for something; the future is settled even if the engine ends."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self._promises.add(future)
        future.add_done_callback(self._promises.discard)
        # after it is in the books: an engine that ends from here on settles it
        self._ledger.check_room()
        self._inbox.put(partial(work, future))
        return future

    # ---- the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._on_start()
            while not self._stopping:
                self._loop.beat()
        except BaseException as error:  # the top of the thread: nothing may end it unseen
            log.critical("engine_died", error=repr(error), exc_info=error)
            self._die(in_short(error))

    def _stop(self) -> None:
        self._stopping = True

    def _die(self, reason: str) -> None:
        if not self._alive:  # given up from outside, and then the thread ended by itself
            return
        dead = EngineDeadError("The engine has failed; the server is about to restart.")
        self._alive = False
        self._death = reason
        self._ledger.refuse(dead)
        self._end_all(dead)
        self._on_death()

    def _end_all(self, error: WorkerError) -> None:
        for ticket in self._ledger.tickets():
            self._ledger.fail(ticket, error)
        for future in tuple(self._promises):
            _settle(future, error)


def _settle(done: Future[None], problem: Exception | None) -> None:
    with contextlib.suppress(InvalidStateError):  # the end of the engine may have been first
        if problem is None:
            done.set_result(None)
        else:
            done.set_exception(as_worker_error(problem))
