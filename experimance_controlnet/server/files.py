"""Model files at the moment a request needs them: fetched once however many ask, never on the loop.

Transfers run on daemon threads, because a process that is told to stop must not wait for one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import structlog

from experimance_controlnet.catalog.hashes import HashNotes
from experimance_controlnet.catalog.inventory import Found
from experimance_controlnet.catalog.page_cache import read_ahead
from experimance_controlnet.catalog.progress import TransferStatus
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.errors import ModelFileError, NotFoundUpstreamError
from experimance_controlnet.threads import on_daemon

log = structlog.get_logger()

T = TypeVar("T")

ABSENT_FOR_S = 600.0
"""How long the origin's word that a file does not exist is believed."""


class Store(Protocol):
    """What is needed of ``catalog.store.ModelStore``; its docstrings say what each raises."""

    def is_remote(self, source: Source) -> bool: ...
    def path(self, source: Source) -> Path | None: ...
    def glance(self, source: Source) -> Found | None: ...
    def fetch(self, source: Source) -> Any: ...
    def content_hash(self, source: Source) -> str | None: ...
    def downloads(self) -> list[TransferStatus]: ...


class ModelFiles:
    """The files of the catalogue. All methods are called on the event loop."""

    def __init__(
        self, store: Store, notes: HashNotes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``notes`` keep the hashes of files beside which the store may not write."""
        self._store = store
        self._notes = notes
        self._clock = clock
        self._transfers: dict[Source, asyncio.Task[None]] = {}
        self._absent_until_s: dict[Source, float] = {}
        self._faults: dict[Source, str] = {}
        self._hashes: dict[Source, asyncio.Task[str | None]] = {}

    async def ensure(self, sources: Iterable[Source]) -> None:
        """Return when all of them are on this disk.

        Raises:
            ModelFileError: one of them cannot be had. An origin's 404 is remembered in
                :attr:`absent`.
        """
        missing = await in_daemon_thread(lambda: self._missing(sources))
        # shielded: a transfer goes on for others when one who waits gives up
        await asyncio.gather(*(asyncio.shield(self._transfer(source)) for source in missing))

    async def found(self, sources: Iterable[Source]) -> dict[Source, Found]:
        """What is on this disk, with the hashes that are known by now; reads no weights."""
        wanted = set(sources)
        found = await in_daemon_thread(lambda: {one: self._store.glance(one) for one in wanted})
        return {source: self._with_hash(source, one) for source, one in found.items() if one}

    @property
    def faults(self) -> Mapping[Source, str]:
        """Why the last transfer of a source failed, where it did."""
        return self._faults

    @property
    def absent(self) -> Collection[Source]:
        """The sources that do not exist, by the word of their origins."""
        now = self._clock()
        return {source for source, until in self._absent_until_s.items() if now < until}

    def downloads(self) -> list[TransferStatus]:
        """How far the transfers are that run."""
        return self._store.downloads()

    async def read_ahead(self, sources: Sequence[Source]) -> None:
        """Bring those that are on this disk into the page cache, as far as half of the free memory
        holds them. A fault is logged: who needs the file meets it again.
        """
        started_s = time.monotonic()
        limit_bytes = psutil.virtual_memory().available // 2
        # of a local file whose hash the catalogue states, every byte is read before it is loaded
        unread = [one for one in sources if one.sha256 is None or self._store.is_remote(one)]

        def work() -> int:
            paths = [self._store.path(source) for source in unread]
            return read_ahead([path for path in paths if path is not None], limit_bytes)

        try:
            read_bytes = await in_daemon_thread(work)
        except OSError as error:
            log.warning("read_ahead_failed", reason=error.strerror)
            return
        seconds = round(time.monotonic() - started_s, 3)
        log.info("weights_read_ahead", read_bytes=read_bytes, seconds=seconds)

    def begin_hash(self, source: Source) -> asyncio.Task[str | None]:
        """Begin to compute what :meth:`content_hash` returns: gigabytes take seconds.

        Nobody has to wait for the task. If it fails, the next who asks begins anew.
        """
        task = self._hashes.get(source)
        if task is None:
            work = in_daemon_thread(lambda: self._hash(source))
            task = self._hashes[source] = asyncio.ensure_future(work)
            task.add_done_callback(lambda done: self._keep_hash(source, done))
        return task

    async def content_hash(self, source: Source) -> str | None:
        """sha256 of the weights, computed once; None where they are not on this disk."""
        return await asyncio.shield(self.begin_hash(source))

    def _hash(self, source: Source) -> str | None:
        path = self._store.path(source)
        if path is None or self._store.is_remote(source):
            return self._store.content_hash(source)
        return self._notes.of(path, lambda: self._store.content_hash(source))

    def _with_hash(self, source: Source, found: Found) -> Found:
        task = self._hashes.get(source)
        if found.sha256 is not None or task is None or not task.done():
            return found
        usable = not task.cancelled() and task.exception() is None
        return replace(found, sha256=task.result()) if usable else found

    def _missing(self, sources: Iterable[Source]) -> list[Source]:
        return [source for source in dict.fromkeys(sources) if self._store.path(source) is None]

    def _transfer(self, source: Source) -> asyncio.Task[None]:
        task = self._transfers.get(source)
        if task is None:
            task = self._transfers[source] = asyncio.ensure_future(self._fetch(source))
            task.add_done_callback(lambda done: self._end_transfer(source, done))
        return task

    def _end_transfer(self, source: Source, done: asyncio.Task[None]) -> None:
        del self._transfers[source]
        if not done.cancelled():
            done.exception()  # seen, even if nobody waits any more

    def _keep_hash(self, source: Source, done: asyncio.Task[str | None]) -> None:
        if done.cancelled() or done.exception() is not None or done.result() is None:
            del self._hashes[source]

    async def _fetch(self, source: Source) -> None:
        try:
            await in_daemon_thread(lambda: self._store.fetch(source))
        except ModelFileError as error:
            self._faults[source] = error.message
            if isinstance(error, NotFoundUpstreamError):
                self._absent_until_s[source] = self._clock() + ABSENT_FOR_S
            raise
        self._faults.pop(source, None)


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """The result of ``work``, on a thread that does not keep the process alive."""
    return await asyncio.wrap_future(on_daemon(work, "files"))
