"""The missing parts of one file over several connections at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from experimance_controlnet.catalog.answers import BrokenOffError, FileChangedError
from experimance_controlnet.catalog.job import Job
from experimance_controlnet.catalog.partial import Span
from experimance_controlnet.catalog.parts import PartRequests
from experimance_controlnet.catalog.reading import Watchdog
from experimance_controlnet.catalog.web import Answer
from experimance_controlnet.errors import NotFoundUpstreamError


class ParallelRanges:
    """Some workers, each with a connection and a thread; all spans are brought or one raises.

    A worker whose connection breaks off gives the rest of its span back, and another one takes its
    place after a pause. Only when the last one broke off, that fault is everybody's.
    """

    def __init__(self, job: Job, spans: Sequence[Span], requests: PartRequests) -> None:
        self._job = job
        self._requests = requests
        self._lock = threading.Lock()
        self._waiting = deque(spans)
        self._watchdog = Watchdog(job.manner.slow_after_s)
        self._workers: list[threading.Thread] = []
        self._working = 0
        self._spare = 0
        """Workers that may still be started in place of others: a bound, since an origin that cuts
        one connection after the other is better asked anew, after a pause."""
        self._stop = False
        self._ended = threading.Event()  # a worker has ended
        self._broke_off: list[BrokenOffError] = []
        self._fault: Exception | None = None

    def run(self, first: Answer) -> None:
        """Bring all spans; ``first`` is the answer to a request for the first of them."""
        workers = min(self._job.manner.connections, len(self._waiting))
        self._spare = workers
        with self._watchdog:
            self._start_worker(first)
            try:
                for _ in range(workers - 1):
                    self._start_worker()
                self._watch(workers)
            finally:
                self._stop_workers()
        if not isinstance(self._fault, OSError):
            self._job.partial.save()
        if self._fault is not None:
            raise self._fault
        if self._waiting:
            raise self._broke_off[-1]

    def _watch(self, workers: int) -> None:
        """Save now and then, and replace who broke off, until no worker is left or one has failed
        for good.
        """
        manner = self._job.manner
        seen, next_start_s = 0, 0.0
        saved_s = time.monotonic()
        while self._fault is None and (working := self._working):
            self._ended.wait(manner.save_every_s)
            self._ended.clear()
            now_s = time.monotonic()
            if now_s - saved_s >= manner.save_every_s:
                self._job.partial.save()
                saved_s = now_s
            if len(self._broke_off) > seen:
                seen = len(self._broke_off)
                error = self._broke_off[-1]
                next_start_s = now_s + manner.backoff.pause_s(seen, error.retry_after_s)
            if (
                seen
                and self._spare
                and working < workers
                and self._waiting
                and now_s >= next_start_s
            ):
                self._start_worker()
                self._spare -= 1

    def _start_worker(self, answer: Answer | None = None) -> None:
        # daemon: a process that is told to stop does not wait for the network
        worker = threading.Thread(target=self._work, args=(answer,), name="range", daemon=True)
        self._workers.append(worker)
        with self._lock:
            self._working += 1
        worker.start()

    def _stop_workers(self) -> None:
        self._stop = True
        self._watchdog.interrupt_all()
        for worker in self._workers:
            worker.join()

    def _work(self, answer: Answer | None) -> None:
        try:
            while (span := self._take()) is not None:
                self._bring(span, answer)
                answer = None
        except FileChangedError as error:
            self._fault = error
        except BrokenOffError as error:
            self._broke_off.append(error)
        except Exception as error:  # noqa: BLE001 - the top of this thread: run raises it
            self._fault = error
        finally:
            with self._lock:
                self._working -= 1
            self._ended.set()

    def _take(self) -> Span | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting and not self._stop else None

    def _bring(self, span: Span, answer: Answer | None) -> None:
        position, end = span
        try:
            with ExitStack() as stack:
                answer = answer or stack.enter_context(self._ask(span))
                reading = stack.enter_context(self._watchdog.over(answer))
                while position < end and not self._stop:
                    data = reading.read(end - position)
                    if not data:
                        raise BrokenOffError(f"{answer.label}: the connection broke off")
                    self._job.partial.write(position, data)
                    position += len(data)
                    self._job.transfer.add(len(data))
        finally:
            if position < end:
                with self._lock:
                    self._waiting.appendleft((position, end))

    @contextmanager
    def _ask(self, span: Span) -> Iterator[Answer]:
        label = self._job.order.label
        with ExitStack() as stack:
            try:
                answer = stack.enter_context(self._requests.get(span))
            except NotFoundUpstreamError as error:
                # It was there a moment ago: the address that the origin redirected to may have
                # expired, and only a new attempt asks for another one.
                self._spare = 0
                raise BrokenOffError(f"{error.message} (its first bytes were there)") from error
            if answer is None:
                raise FileChangedError(f"{label}: the file changes while it is fetched")
            yield answer
