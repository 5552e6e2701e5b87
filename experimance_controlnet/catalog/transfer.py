"""One file over the network: parallel ranges where the origin allows them, else one stream.

Ranges are used where the origin sends parts (206) and names the state of the file with a strong
ETag or a date; every part must then be of that state and length. Such a transfer goes on where it
broke off, in this process or in a later one. Any other origin's file is fetched in one piece.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import structlog

from experimance_controlnet.catalog.answers import BrokenOffError, FileChangedError, Part, Whole
from experimance_controlnet.catalog.backoff import patiently
from experimance_controlnet.catalog.digest import FollowingHash
from experimance_controlnet.catalog.disk import check_free_space
from experimance_controlnet.catalog.job import Job, Manner, Order
from experimance_controlnet.catalog.partial import Identity, Partial
from experimance_controlnet.catalog.parts import PartRequests, range_header
from experimance_controlnet.catalog.progress import Transfer
from experimance_controlnet.catalog.ranges import ParallelRanges
from experimance_controlnet.catalog.reading import Watchdog
from experimance_controlnet.catalog.web import Answer, Web
from experimance_controlnet.errors import BadWeightsError, ChecksumMismatchError, DownloadError

_log = structlog.get_logger()


def fetch_file(order: Order, path: Path, web: Web, transfer: Transfer, manner: Manner) -> str:
    """Bring a file to ``path``, whose folder is this transfer's own; returns its sha256.

    The folder is made if need be. After a fault of the network it is kept, if a later call can use
    what is in it; after any other it is removed. Raises BrokenOffError, NotFoundUpstreamError,
    DownloadError, BadWeightsError, DiskFullError; OSError of this disk.
    """
    continued, digest = _fetch(order, path, web, transfer, manner)
    if continued and order.sha256 not in (None, digest):
        # what lay on the disk since an earlier process may have suffered there
        _log.warning("download_begins_anew", uri=order.label, reason="its sha256 is wrong")
        shutil.rmtree(path.parent)
        _, digest = _fetch(order, path, web, transfer, manner)
    if order.sha256 not in (None, digest):
        shutil.rmtree(path.parent)
        raise ChecksumMismatchError(
            f"{order.label} does not have the sha256 that is stated for it: fetch it again, and "
            "where that does not help, correct the catalogue"
        )
    transfer.end_file()
    return digest


def _fetch(
    order: Order, path: Path, web: Web, transfer: Transfer, manner: Manner
) -> tuple[bool, str]:
    """Returns whether it continued an earlier transfer, and the sha256."""
    partial = Partial(path)
    job = Job(order, partial, web, transfer, manner)
    continued, useful = partial.identity is not None, False
    with ExitStack() as stack:
        stack.callback(lambda: None if useful else partial.discard())
        stack.callback(partial.release)
        hashing = FollowingHash(partial)
        stack.callback(hashing.stop)
        stack.callback(partial.close)
        try:
            patiently(lambda: _attempt(job), manner.backoff, lambda: partial.done_bytes)
            partial.finish()
        except (DownloadError, KeyboardInterrupt):
            useful = partial.identity is not None and partial.done_bytes > 0
            raise
        partial.close()
        digest = hashing.result()
        useful = True
    return continued, digest


def _attempt(job: Job) -> None:
    """All bytes are in the partial file, or an error is raised."""
    try:
        if job.partial.identity is None or not _resume(job, job.partial.identity):
            _start(job)
    except FileChangedError:
        _begin(job, None)
        raise


def _resume(job: Job, identity: Identity) -> bool:
    """False: the origin's file is not the one that was begun."""
    order, done_bytes = job.order, job.partial.done_bytes
    spans = job.partial.missing(job.manner.range_bytes)
    requests = PartRequests(job, identity, order.url)
    with requests.get(spans[0]) as answer:
        if answer is not None:
            _log.info("download_resumed", uri=order.label, done_bytes=done_bytes)
            _check_length(job, identity.size_bytes)
            job.transfer.begin_file(identity.size_bytes, done_bytes)
            ParallelRanges(job, spans, requests.at(answer.url)).run(answer)
            return True
    _log.warning("download_begins_anew", uri=order.label, reason="the file has changed")
    return False


def _start(job: Job) -> None:
    order = job.order
    with job.web.get(order.label, order.url, range_header((0, job.manner.range_bytes))) as answer:
        meaning = answer.meaning
        if isinstance(meaning, Whole):
            _stream(job, answer, meaning)
            return
        if isinstance(meaning, Part) and (identity := _identity(meaning)):
            _check_length(job, identity.size_bytes)
            _begin(job, identity)
            spans = [(0, meaning.end), *_rest(job, meaning.end)]
            ParallelRanges(job, spans, PartRequests(job, identity, answer.url)).run(answer)
            return
    # no parts, or none that can safely be put together
    with job.web.get(order.label, order.url, {}) as answer:
        if not isinstance(answer.meaning, Whole):
            raise DownloadError(f"{order.label}: the origin sends something else than the file")
        _stream(job, answer, answer.meaning)


def _identity(part: Part) -> Identity | None:
    if part.start != 0 or part.version is None or part.size_bytes is None:
        return None
    return Identity(part.version, part.size_bytes)


def _rest(job: Job, start: int) -> list[tuple[int, int]]:
    """Of a file that has just begun, all spans from ``start``."""
    assert job.partial.identity is not None
    size_bytes, step = job.partial.identity.size_bytes, job.manner.range_bytes
    return [(at, min(at + step, size_bytes)) for at in range(start, size_bytes, step)]


def _stream(job: Job, answer: Answer, whole: Whole) -> None:
    _check_length(job, whole.size_bytes)
    _begin(job, None, whole.size_bytes)
    position = 0
    with Watchdog(job.manner.slow_after_s) as watchdog, watchdog.over(answer) as reading:
        while data := reading.read():
            job.partial.write(position, data)
            position += len(data)
            job.transfer.add(len(data))
    if whole.size_bytes not in (None, position):
        raise BrokenOffError(f"{answer.label}: the connection broke off; check the network")


def _check_length(job: Job, size_bytes: int | None) -> None:
    """Of the origin against the catalogue and the disk. Raises BadWeightsError, DiskFullError."""
    stated = job.order.size_bytes
    if size_bytes is not None and stated not in (None, size_bytes):
        raise BadWeightsError(
            f"{job.order.label} has {size_bytes} bytes; the catalogue says {stated}"
        )
    if size_bytes is not None:
        needed_bytes = max(0, size_bytes - job.partial.held_bytes)
        check_free_space(job.partial.path.parent, needed_bytes)


def _begin(job: Job, identity: Identity | None, size_bytes: int | None = None) -> None:
    job.partial.begin(identity)
    job.transfer.begin_file(identity.size_bytes if identity else size_bytes, 0)
