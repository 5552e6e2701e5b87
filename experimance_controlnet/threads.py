"""Work on threads that do not keep the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def on_daemon(work: Callable[[], T], name: str) -> Future[T]:
    """The result of ``work`` to come, from a thread of that name. It cannot be cancelled: who waits
    may give up, the work goes on.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the top of this thread: who waits judges it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
