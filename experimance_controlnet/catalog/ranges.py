"""The missing parts of one file over several connections at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from experimance_controlnet.catalog.answers import (
    BrokenOffError,
    FileChangedError,
    FutileError,
    Part,
    Whole,
)
from experimance_controlnet.catalog.backoff import Backoff
from experimance_controlnet.catalog.partial import Identity, Partial, Span
from experimance_controlnet.catalog.progress import Transfer
from experimance_controlnet.catalog.web import Answer, Web
from experimance_controlnet.errors import DownloadError, NotFoundUpstreamError

READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Manner:
    """How files are fetched."""

    connections: int = 8
    range_bytes: int = 32 << 20
    save_every_s: float = 1.0
    """A killed process loses what came since; each time is a flush of what was written."""
    silence_s: float = 30.0
    """How long an origin may send nothing."""
    slow_after_s: float = 30.0
    slow_bytes_per_s: float = 2000.0
    """A connection that was slower for so long is given up, and another one tried."""
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(frozen=True, slots=True)
class Order:
    """What to fetch. ``label`` names it in errors; what nobody states is None."""

    label: str
    url: str
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One file on its way."""

    order: Order
    partial: Partial
    web: Web
    transfer: Transfer
    manner: Manner


class Pace:
    """Notices a connection that delivers, but too little for anybody to wait for."""

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._since_s = time.monotonic()
        self._bytes = 0

    def check(self, label: str, received_bytes: int) -> None:
        """Count what came. Raises FutileError."""
        self._bytes += received_bytes
        elapsed_s = time.monotonic() - self._since_s
        if elapsed_s < self._manner.slow_after_s:
            return
        if self._bytes < self._manner.slow_bytes_per_s * elapsed_s:
            rate = round(self._bytes / elapsed_s)
            raise FutileError(f"{label}: the origin sends only {rate} bytes a second")
        self._since_s, self._bytes = time.monotonic(), 0


def range_header(span: Span) -> dict[str, str]:
    """Ask for a span."""
    return {"Range": f"bytes={span[0]}-{span[1] - 1}"}


class PartRequests:
    """Asks for parts of one state of a file; ``url`` may be where the origin redirected to."""

    def __init__(self, job: Job, identity: Identity, url: str, conditional: bool = True) -> None:
        self._job = job
        self._identity = identity
        self._url = url
        self._conditional = conditional

    def at(self, url: str) -> PartRequests:
        """The same at another address."""
        return PartRequests(self._job, self._identity, url, self._conditional)

    @contextmanager
    def get(self, span: Span) -> Iterator[Answer | None]:
        """The answer that holds just this span; None: the file is not the one that was begun."""
        if self._conditional:
            with self._send(span, {"If-Range": self._identity.version}) as answer:
                if not isinstance(answer.meaning, Whole):
                    yield answer if self._fits(answer, span) else None
                    return
            # the file has changed; or the origin sends all of it whenever there is a condition
        with self._send(span, {}) as answer:
            fits = self._fits(answer, span)
            self._conditional = self._conditional and not fits
            yield answer if fits else None

    @contextmanager
    def _send(self, span: Span, condition: Mapping[str, str]) -> Iterator[Answer]:
        order, headers = self._job.order, {**range_header(span), **condition}
        with self._job.web.get(order.label, self._url, headers, home_url=order.url) as answer:
            yield answer

    def _fits(self, answer: Answer, span: Span) -> bool:
        identity = self._identity
        return answer.meaning == Part(*span, identity.size_bytes, identity.version)


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
        self._open: set[Answer] = set()
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
        with self._lock:
            self._stop = True
            for answer in self._open:
                answer.interrupt()
        for worker in self._workers:
            worker.join()

    def _work(self, answer: Answer | None) -> None:
        try:
            while (span := self._take()) is not None:
                self._bring(span, answer)
                answer = None
        except BrokenOffError as error:
            if isinstance(error, FileChangedError):
                self._fault = error
            else:
                self._broke_off.append(error)
        except (DownloadError, OSError) as error:
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
                stack.enter_context(self._interruptible(answer))
                pace = Pace(self._job.manner)
                while position < end:
                    data = answer.read(min(READ_BYTES, end - position))
                    if self._stop:
                        # an interrupted TLS connection may hand out what is still encrypted
                        return
                    if not data:
                        raise BrokenOffError(f"{answer.label}: the connection broke off")
                    self._job.partial.write(position, data)
                    position += len(data)
                    self._job.transfer.add(len(data))
                    pace.check(answer.label, len(data))
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

    @contextmanager
    def _interruptible(self, answer: Answer) -> Iterator[None]:
        with self._lock:
            self._open.add(answer)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(answer)
