"""The engine: one thread that owns the device, and its heartbeat.

Other threads only put work into its inbox and wait for futures. What the engine does not know:
HTTP, image formats, where files come from, and what a model is (that is the runner's).

Every accepted request ends exactly once: with a result, or with a typed error.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import structlog

from experimance_controlnet.engine.batcher import Batcher, NewBatchPolicy
from experimance_controlnet.engine.costs import StepCosts
from experimance_controlnet.engine.faults import as_worker_error, is_fatal, is_out_of_memory
from experimance_controlnet.engine.loading import Loads, LoadTotal
from experimance_controlnet.engine.meter import StepMeter
from experimance_controlnet.engine.request import (
    Asset,
    GenerationRequest,
    Progress,
    ProgressListener,
    RequestState,
)
from experimance_controlnet.engine.runner import GpuMemory, PendingFrame, Runner
from experimance_controlnet.engine.tickets import Ledger, Ticket
from experimance_controlnet.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    ModelBusyError,
    RequestAbortedError,
    WorkerError,
)

log = structlog.get_logger()

IDLE_BEAT_S = 0.25
"""How long the idle engine sleeps at most: deadlines and the watchdog need a regular beat."""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """What a health check may know; reading it never waits for the device."""

    alive: bool
    hung: bool
    """Busy, and no heartbeat for longer than the watchdog allows."""
    draining: bool
    models_loaded: tuple[str, ...]
    models_loading: tuple[str, ...]
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
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

        # Written by one thread, read by others; each is one reference, so no lock is needed.
        self._alive = True
        self._draining = False
        self._heartbeat_s = math.inf  # until it has begun to beat, it cannot have stopped
        self._last_error: str | None = None
        self._promises: set[Future[None]] = set()

        # The engine's thread only.
        costs = StepCosts()
        self._batcher = new_batcher(max_rows, costs)
        self._meter = StepMeter(costs, clock)
        self._tickets: dict[RequestState, Ticket] = {}
        self._frames: dict[RequestState, PendingFrame] = {}  # being decoded, oldest first
        self._waiting: dict[Ticket, None] = {}  # for a load, in order of acceptance
        self._loads = Loads(runner, self._inbox.put, self._models_in_use)
        self._warming_up = False  # the last beat prepared something, and there is more
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
            self._inbox.put(partial(self._admit, ticket))
        return tickets

    def check_room(self, images: int) -> None:
        """Ask before costly preparations: raises what :meth:`submit` would raise right now.

        Raises:
            QueueFullError, DrainingError, EngineDeadError
        """
        self._ledger.check_room(images)

    def abort(self, ticket: Ticket) -> None:
        """End a request at its next step boundary; without effect where it has ended already."""
        self._inbox.put(partial(self._drop, ticket))

    def load(self, model: str) -> Future[None]:
        """Bring a model into memory. The future fails with the reason why it cannot be.

        Raises:
            DrainingError, EngineDeadError
        """
        asset = Asset("model", model, model)
        return self._promise(lambda done: self._loads.want(asset, partial(_settle, done)))

    def unload(self, model: str) -> Future[None]:
        """Free a model. The future fails with ModelBusyError where requests use it.

        Raises:
            DrainingError, EngineDeadError
        """
        return self._promise(partial(self._unload, model))

    def health(self) -> EngineHealth:
        """A snapshot."""
        tickets = self._ledger.tickets()
        silent_s = self._clock() - self._heartbeat_s
        return EngineHealth(
            alive=self._alive,
            hung=bool(tickets) and silent_s > self._watchdog_s,
            draining=self._draining,
            models_loaded=self._runner.loaded_models,
            models_loading=self._loads.models,
            queue_depth=len(tickets),
            queue_workload=sum(ticket.request.workload for ticket in tickets),
            last_error=self._last_error,
        )

    def holds(self, kind: Literal["model", "controlnet", "lora"], name: str) -> bool:
        """Whether it is in memory: of a LoRA, for one of the models that are. A snapshot."""
        models = self._runner.loaded_models
        if kind == "model":
            return name in models
        if kind == "controlnet":
            return self._runner.has(Asset(kind, name, name))
        for model in models:
            with contextlib.suppress(KeyError):  # that model leaves at this moment
                if self._runner.has(Asset(kind, name, model)):
                    return True
        return False

    def model_loads(self) -> dict[str, LoadTotal]:
        """How often each model was read, and how long that took."""
        return dict(self._loads.totals)

    @property
    def device_name(self) -> str:
        """For people."""
        return self._runner.device_name

    @property
    def precision(self) -> str:
        """What models are computed in."""
        return self._runner.precision

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
                self._heartbeat()
        except BaseException as error:  # the top of the thread: nothing may end it unseen
            log.critical("engine_died", error=repr(error), exc_info=error)
            self._die(_in_short(error))

    def _heartbeat(self) -> None:
        """Do what others asked for, choose a batch, let it take one step, hand out what is done."""
        self._drain_inbox()
        self._expire()
        batch = self._batcher.next_batch()
        if batch:
            self._step(batch)
        busy = bool(batch or self._frames)
        self._deliver_frames(wait=not batch)
        if not busy:
            self._warm_up()

    def _drain_inbox(self) -> None:
        self._heartbeat_s = self._clock()
        busy = bool(len(self._batcher) or self._frames)
        try:
            self._inbox.get(timeout=0 if busy or self._warming_up else IDLE_BEAT_S)()
            self._warming_up = False
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            self._heartbeat_s = self._clock()

    def _warm_up(self) -> None:
        """Prepare for what may be asked next.

        After a picture the inbox is waited for first: the pauses of a busy client are shorter.
        """
        idle = not len(self._batcher) and not self._frames and self._inbox.empty()
        self._warming_up = False
        try:
            self._warming_up = idle and self._runner.warm_up()
        except Exception as error:  # nobody asked for it: it may cost time, but no request
            if is_fatal(error):
                raise
            log.warning("warm_up_failed", error=repr(error))
        else:
            return
        self._runner.release_memory()  # where the error no longer keeps its tensors alive

    def _step(self, batch: list[RequestState]) -> None:
        ready = [state for state in batch if self._attempt(state, self._prepare, state)]
        for state, prediction in self._predict(ready):
            self._attempt(state, self._finish_step, state, prediction)

    def _prepare(self, state: RequestState) -> None:
        if state.timer.started_s is None:
            state.timer.started_s = self._clock()
            self._runner.prepare(state)
            state.timer.encoded_s = self._clock()

    def _predict(self, states: list[RequestState]) -> list[tuple[RequestState, Any]]:
        """One evaluation for all. Where it fails, one for each: only the culprit ends."""
        if len(states) > 1:
            try:
                return list(zip(states, self._evaluate(states), strict=True))
            except Exception as error:
                if is_fatal(error):
                    raise
                log.warning("batch_split", requests=len(states), error=repr(error))
            # Outside the except block, where the error no longer keeps the batch's tensors alive.
            self._runner.release_memory()
        predictions: list[tuple[RequestState, Any]] = []
        for state in states:
            self._attempt(state, self._predict_alone, state, predictions)
        return predictions

    def _predict_alone(
        self, state: RequestState, predictions: list[tuple[RequestState, Any]]
    ) -> None:
        [prediction] = self._evaluate([state])
        predictions.append((state, prediction))

    def _evaluate(self, states: list[RequestState]) -> Sequence[Any]:
        self._meter.begin(states)
        predictions = self._runner.predict(states)
        self._meter.end()
        return predictions

    def _finish_step(self, state: RequestState, prediction: Any) -> None:
        self._runner.advance(state, prediction)
        ticket = self._tickets[state]
        if ticket.on_progress is not None:
            ticket.on_progress(Progress(state.step, state.request.steps))
        if state.finished:
            self._frames[state] = self._runner.decode(state)
            self._batcher.remove(state)

    def _deliver_frames(self, wait: bool) -> None:
        """Hand out the frames that are ready, in order; with nothing else to do, wait for one."""
        for state, frame in tuple(self._frames.items()):
            if not wait and not frame.ready():
                return
            self._attempt(state, self._deliver, state, frame)
            wait = False

    def _deliver(self, state: RequestState, frame: PendingFrame) -> None:
        pixels, notes = frame.result()
        state.notes += notes
        state.timer.decoded_s = self._clock()
        # The host is ahead of the device; when denoising really ended, only the device knows.
        state.timer.denoised_s = state.timer.decoded_s - frame.decode_s
        ticket = self._tickets[state]
        result = state.result(pixels)
        self._forget(ticket)
        self._ledger.finish(ticket, result)

    def _attempt(self, state: RequestState, work: Callable[..., None], *arguments: Any) -> bool:
        """Do the work; an error in it ends this request and no other."""
        try:
            work(*arguments)
        except Exception as error:
            if is_fatal(error):
                raise
            out_of_memory = is_out_of_memory(error)
            self._fail(self._tickets[state], error)
        else:
            return True
        if out_of_memory:
            self._runner.release_memory()
        return False

    # ---- admission and models ---------------------------------------------------------------

    def _admit(self, ticket: Ticket) -> None:
        self._waiting[ticket] = None
        self._continue_admission(ticket, problem=None)

    def _continue_admission(self, ticket: Ticket, problem: Exception | None) -> None:
        """Wait for one missing thing after the other, then hand the request to the batcher."""
        if ticket not in self._ledger:  # aborted or expired meanwhile
            return
        if problem is not None:
            self._fail(ticket, problem)
            return
        try:
            missing = self._runner.missing(ticket.request)
            if missing is not None:
                self._loads.want(missing, partial(self._continue_admission, ticket))
                return
            state = self._runner.admit(ticket.request, ticket.accepted_s)
        except Exception as error:
            if is_fatal(error):
                raise
            self._fail(ticket, error)
            return
        del self._waiting[ticket]
        self._tickets[state] = ticket
        self._batcher.add(state)

    def _unload(self, model: str, done: Future[None]) -> None:
        if model in self._models_in_use() or model in self._loads.models:
            _settle(done, ModelBusyError(f"Requests use the model {model}; try again later."))
            return
        if model in self._runner.loaded_models:
            self._runner.unload(model)
        _settle(done, None)

    def _models_in_use(self) -> set[str]:
        return {ticket.request.model for ticket in self._ledger.tickets()}

    # ---- endings ----------------------------------------------------------------------------

    def _drop(self, ticket: Ticket) -> None:
        if ticket in self._ledger:
            self._fail(ticket, RequestAbortedError("The request was cancelled."))

    def _expire(self) -> None:
        now = self._clock()
        not_begun = [
            self._tickets[state] for state in self._batcher if state.timer.started_s is None
        ]
        for ticket in [*self._waiting, *not_begun]:
            deadline_s = ticket.request.deadline_s
            if deadline_s is not None and now > deadline_s:
                waited_s = now - ticket.accepted_s
                self._fail(ticket, DeadlineExceededError(f"Not begun after {waited_s:.1f} s."))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        failure = as_worker_error(error)
        if failure is not error or error.__cause__ is not None:
            request_id = ticket.request.request_id
            log.error("request_failed", request_id=request_id, error=repr(error), exc_info=error)
            self._last_error = _in_short(error)
        # The frames of a traceback hold the request's tensors, and the future would hold them.
        failure.__cause__ = failure.__context__ = failure.__traceback__ = None
        self._forget(ticket)
        self._ledger.fail(ticket, failure)

    def _forget(self, ticket: Ticket) -> None:
        self._waiting.pop(ticket, None)
        for state in [state for state, owner in self._tickets.items() if owner is ticket]:
            del self._tickets[state]
            if self._frames.pop(state, None) is None:
                self._batcher.remove(state)

    def _stop(self) -> None:
        self._stopping = True

    def _die(self, reason: str) -> None:
        if not self._alive:  # given up from outside, and then the thread ended by itself
            return
        dead = EngineDeadError("The engine has failed; the server is about to restart.")
        self._alive = False
        self._last_error = reason
        self._ledger.refuse(dead)
        self._end_all(dead)
        self._on_death()

    def _end_all(self, error: WorkerError) -> None:
        for ticket in self._ledger.tickets():
            self._ledger.fail(ticket, error)
        for future in tuple(self._promises):
            _settle(future, error)


def _in_short(error: BaseException) -> str:
    """For the health check, which anybody may read: an error's own text can hold a path."""
    return f"{type(error).__name__}; the server's log has the cause"


def _settle(done: Future[None], problem: Exception | None) -> None:
    with contextlib.suppress(InvalidStateError):  # the end of the engine may have been first
        if problem is None:
            done.set_result(None)
        else:
            done.set_exception(as_worker_error(problem))
