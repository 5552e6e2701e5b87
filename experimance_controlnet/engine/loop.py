"""The engine's heartbeat, and all that only its thread may touch: which requests wait, which are
under way, and what becomes of each.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable
from functools import partial

import structlog

from experimance_controlnet.engine.batcher import NewBatchPolicy
from experimance_controlnet.engine.costs import StepCosts
from experimance_controlnet.engine.faults import as_worker_error, attempt
from experimance_controlnet.engine.loading import Loads, Waiter
from experimance_controlnet.engine.request import Asset, PixelImage, Progress, RequestState
from experimance_controlnet.engine.runner import Runner
from experimance_controlnet.engine.stepping import Stepper
from experimance_controlnet.engine.tickets import Ledger, Ticket
from experimance_controlnet.errors import (
    DeadlineExceededError,
    ModelBusyError,
    RequestAbortedError,
)

log = structlog.get_logger()

IDLE_BEAT_S = 0.25
"""How long the idle engine sleeps at most: deadlines and the watchdog need a regular beat."""

Inbox = queue.SimpleQueue[Callable[[], None]]
"""What other threads want done on the engine's."""


class EngineLoop:
    """Engine's thread only, but for what is said to be safe. Every ticket given to :meth:`admit`
    ends exactly once.
    """

    def __init__(
        self,
        runner: Runner,
        ledger: Ledger,
        inbox: Inbox,
        clock: Callable[[], float],
        max_rows: int,
        new_batcher: NewBatchPolicy,
    ) -> None:
        """``ledger`` has the tickets that :meth:`admit` is called with. ``clock`` in seconds."""
        self._runner = runner
        self._ledger = ledger
        self._inbox = inbox
        self._clock = clock
        costs = StepCosts()
        self._batcher = new_batcher(max_rows, costs)
        self._stepper = Stepper(runner, costs, clock, self)
        self._tickets: dict[RequestState, Ticket] = {}  # of requests under way
        self._waiting: dict[Ticket, Waiter | None] = {}  # for a load, in order of acceptance
        self._held: list[Ticket] = []  # of these, until what runs has made room for a load
        self._warming_up = False  # the last beat prepared something, and there is more
        self.loads = Loads(
            runner, inbox.put, self._needed_beside, lambda: bool(self._tickets), clock
        )
        """Its properties are safe on any thread."""
        self.beat_s = math.inf
        """When it last showed life; before it has begun to beat, it cannot have stopped. Safe on
        any thread."""
        self.last_error: str | None = None
        """Safe on any thread."""

    def beat(self) -> None:
        """Do what others asked for, choose a batch, let it take one step, hand out what is done."""
        self._drain_inbox()
        self._expire()
        self._resume_load()
        batch = self._batcher.next_batch()
        if batch:
            self._stepper.step(batch)
        busy = bool(batch or self._stepper.decoding)
        self._stepper.deliver_frames(wait=not batch)
        if not busy:
            self._warm_up()

    def _drain_inbox(self) -> None:
        self.beat_s = self._clock()
        busy = self._tickets or self._warming_up or self.loads.short_of_room
        try:
            self._inbox.get(timeout=0 if busy else IDLE_BEAT_S)()
            self._warming_up = False
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            self.beat_s = self._clock()

    def _warm_up(self) -> None:
        """Prepare for what may be asked next.

        After a picture the inbox is waited for first: the pauses of a busy client are shorter.
        """
        idle = not self._tickets and self._inbox.empty()
        self._warming_up = False
        error = attempt(self._warm_up_a_piece) if idle else None
        if error is not None:  # nobody asked for it: it may cost time, but no request
            log.warning("warm_up_failed", error=repr(error))
            self._runner.release_memory()

    def _warm_up_a_piece(self) -> None:
        self._warming_up = self._runner.warm_up()

    # ---- what other threads ask for, through the inbox --------------------------------------

    def admit(self, ticket: Ticket) -> None:
        """Let a request in as soon as what it needs is in memory."""
        self._waiting[ticket] = None
        self._continue_admission(ticket, problem=None)

    def drop(self, ticket: Ticket) -> None:
        """End a request; without effect where it has ended already."""
        if ticket in self._ledger:
            self._fail(ticket, RequestAbortedError("The request was cancelled."))

    def load(self, model: str, waiter: Waiter) -> None:
        """Bring a model into memory."""
        self.loads.want(Asset("model", model), waiter)

    def unload(self, model: str, waiter: Waiter) -> None:
        """Free a model; ModelBusyError where requests use it or wait for it."""
        in_use = {ticket.request.model for ticket in self._ledger.tickets()}
        coming = model in self.loads.models or Asset("model", model) in self.loads.read_against
        if model in in_use or coming:
            waiter(ModelBusyError(f"Requests use the model {model}; try again later."))
            return
        self._runner.unload(model)
        waiter(None)

    # ---- admission --------------------------------------------------------------------------

    def _continue_admission(self, ticket: Ticket, problem: Exception | None) -> None:
        """Wait for one missing thing after the other, then hand the request to the batcher."""
        if ticket not in self._ledger:  # aborted or expired meanwhile
            return
        if problem is None and self.loads.short_of_room:
            self._held.append(ticket)  # or those under way would never become fewer
            return
        problem = problem or attempt(partial(self._try_to_admit, ticket))
        if problem is not None:
            self._fail(ticket, problem)

    def _try_to_admit(self, ticket: Ticket) -> None:
        missing = self._runner.missing(ticket.request)
        if missing is not None:
            waiter = self._waiting[ticket] = partial(self._continue_admission, ticket)
            self.loads.want(missing, waiter)
            return
        state = self._runner.admit(ticket.request, ticket.accepted_s)
        del self._waiting[ticket]
        self._tickets[state] = ticket
        self._batcher.add(state)

    def _resume_load(self) -> None:
        """A load that had no room beside what ran goes on when nothing runs any more; then, or when
        nobody waits for it any more, so do those behind it.
        """
        if self.loads.short_of_room:
            if self._tickets:
                return
            self.loads.resume()
        held, self._held = self._held, []
        for ticket in held:
            self._continue_admission(ticket, problem=None)

    def _needed_beside(self, asset: Asset) -> set[Asset]:
        """What must not leave memory for this asset: it is in use, or needed together with it."""
        waiting = (ticket.request.assets for ticket in self._waiting)
        together = {other for assets in waiting if asset in assets for other in assets}
        return self.assets_in_use() | together

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

    # ---- what the stepper tells (see stepping.Outcomes) -------------------------------------

    def assets_in_use(self) -> set[Asset]:
        """Of all requests under way, and of the load."""
        under_way = {asset for ticket in self._tickets.values() for asset in ticket.request.assets}
        return under_way | self.loads.read_against

    def stepped(self, state: RequestState) -> None:
        on_progress = self._tickets[state].on_progress
        if on_progress is not None:
            on_progress(Progress(state.step, state.request.steps))

    def all_stepped(self, state: RequestState) -> None:
        self._batcher.remove(state)

    def finished(self, state: RequestState, pixels: PixelImage) -> None:
        ticket, result = self._tickets[state], state.result(pixels)
        self._forget(ticket)
        self._ledger.finish(ticket, result)

    def failed(self, state: RequestState, error: Exception) -> None:
        self._fail(self._tickets[state], error)

    # ---- endings ----------------------------------------------------------------------------

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        failure = as_worker_error(error)
        if failure is not error or error.__cause__ is not None:
            request_id = ticket.request.request_id
            log.error("request_failed", request_id=request_id, error=repr(error), exc_info=error)
            self.last_error = in_short(error)
        # The frames of a traceback hold the request's tensors, and the future would hold them.
        failure.__cause__ = failure.__context__ = failure.__traceback__ = None
        self._forget(ticket)
        self._ledger.fail(ticket, failure)

    def _forget(self, ticket: Ticket) -> None:
        waiter = self._waiting.pop(ticket, None)
        if waiter is not None:
            self.loads.withdraw(waiter)
        for state in [state for state, owner in self._tickets.items() if owner is ticket]:
            del self._tickets[state]
            self._stepper.forget(state)
            if not state.finished:
                self._batcher.remove(state)


def in_short(error: BaseException) -> str:
    """For the health check, which anybody may read: an error's own text can hold a path."""
    return f"{type(error).__name__}; the server's log has the cause"
