"""An unfinished file on disk: which of its bytes are there, also after the process was killed.

A folder holds the file, at its full length from the start, and ``journal``: JSON of the file's
version, its length and the spans of bytes that are on the disk itself. The journal claims a span
only after it was flushed, so it can be believed after a power cut too.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from experimance_controlnet.catalog.disk import flush

Span = tuple[int, int]
"""From the first byte to before the last one's successor."""

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """Which state of which file the bytes belong to: ``answers.Part``'s version, and the length."""

    version: str
    size_bytes: int


class Partial:
    """The file ``path`` while it arrives. ``write`` may be called from many threads.

    ``identity`` is None where the bytes of this try cannot be used by a later one.
    """

    def __init__(self, path: Path) -> None:
        """Open or create it, with what an earlier process left. Raises OSError."""
        self.path = path
        self._journal = path.with_name("journal")
        path.parent.mkdir(exist_ok=True)
        # no links: what is written to must be in this folder
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(path, flags, 0o666)
        self._changed = threading.Condition()
        self._spans: list[Span] = []
        self._generation = 0
        self._closed = False
        self._saved: list[Span] = []
        self.identity: Identity | None = None
        self._restore()

    def begin(self, identity: Identity | None) -> None:
        """Forget all bytes; the file is now that one (None: cannot be resumed). Raises OSError."""
        self._journal.unlink(missing_ok=True)
        flush(self._journal.parent)
        os.ftruncate(self.descriptor, 0)
        if identity is not None:
            os.ftruncate(self.descriptor, identity.size_bytes)
        with self._changed:
            self.identity = identity
            self._spans, self._saved = [], []
            self._generation += 1
            self._changed.notify_all()

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes that were missing. Raises OSError."""
        rest = memoryview(data)
        position = offset
        while rest:
            written = os.pwrite(self.descriptor, rest, position)
            rest, position = rest[written:], position + written
        with self._changed:
            self._spans = _with_span(self._spans, (offset, position))
            self._changed.notify_all()

    @property
    def done_bytes(self) -> int:
        """How many are there."""
        with self._changed:
            return sum(end - start for start, end in self._spans)

    @property
    def held_bytes(self) -> int:
        """What it takes of the disk."""
        return os.fstat(self.descriptor).st_blocks * 512

    def missing(self, most_bytes: int) -> list[Span]:
        """What is not there, in order, in spans of at most that length. Needs an ``identity``."""
        assert self.identity is not None
        with self._changed:
            ends = [*self._spans, (self.identity.size_bytes,) * 2]
        gaps, position = list[Span](), 0
        for start, end in ends:
            gaps += [(at, min(at + most_bytes, start)) for at in range(position, start, most_bytes)]
            position = end
        return gaps

    def wait_for_more(self, generation: int, position: int) -> tuple[int, int]:
        """Block until the file is there up to beyond ``position``, begins anew, or is closed.

        Returns which beginning it is now, and up to where it is there without a gap; the same two
        where it was closed.
        """
        with self._changed:
            while True:
                there = self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0
                if self._closed or generation != self._generation or there > position:
                    return self._generation, there
                self._changed.wait()

    def save(self) -> None:
        """Flush, then write the journal. Raises OSError."""
        with self._changed:
            identity, spans = self.identity, self._spans
        if identity is None or spans == self._saved:
            return
        os.fdatasync(self.descriptor)
        note = {
            "format": _FORMAT,
            "version": identity.version,
            "size_bytes": identity.size_bytes,
            "done": spans,
        }
        draft = self._journal.with_name("journal.new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(note, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self._journal)
        self._saved = spans

    def finish(self) -> None:
        """Flush all of it: it may be moved to its final name. Raises OSError."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Nobody writes any more; who waits is woken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def release(self) -> None:
        """Close the file itself, once nobody reads it any more either."""
        os.close(self.descriptor)

    def discard(self) -> None:
        """Remove it with its folder."""
        shutil.rmtree(self.path.parent)

    def _restore(self) -> None:
        note = _read_journal(self._journal)
        if note is None or os.fstat(self.descriptor).st_size != note[0].size_bytes:
            return
        self.identity, spans = note
        # The last byte is asked for again: so the origin confirms even a file that is all there.
        last = self.identity.size_bytes - 1
        self._spans = [(start, min(end, last)) for start, end in spans if start < last]
        self._saved = self._spans


def _with_span(spans: list[Span], new: Span) -> list[Span]:
    """A new list, sorted, neighbours joined."""
    joined: list[Span] = []
    for start, end in sorted([*spans, new]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _read_journal(path: Path) -> tuple[Identity, list[Span]] | None:
    """None where there is none, or it is not one: then the transfer starts from the beginning."""
    try:
        note = json.loads(path.read_bytes())
        identity = Identity(note["version"], note["size_bytes"])
        spans = [(start, end) for start, end in note["done"]]
        numbers = [identity.size_bytes, *(number for span in spans for number in span)]
        if note["format"] != _FORMAT or not isinstance(identity.version, str):
            return None
        if not all(type(number) is int for number in numbers):
            return None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        return None
    position = 0
    for start, end in spans:
        if not position <= start < end <= identity.size_bytes:
            return None
        position = end
    return identity, spans
