"""One writer of a file, across threads and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock at ``path``; call ``on_wait`` once where somebody else holds it first.

    It is an flock, which ends with the process that holds it, however that ends: a file that a
    killed process left locks nothing. Raises OSError, also on a disk that has no such locks:
    a substitute that outlives its process would have to be removed by hand.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        # While it is held: who waits then finds that its file has no name, and makes a new one.
        path.unlink(missing_ok=True)
        lock.release()
