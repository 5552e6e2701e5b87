"""How often and after which pauses a transfer is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog

from experimance_controlnet.catalog.answers import BrokenOffError, FutileError

T = TypeVar("T")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Backoff:
    """Tries in a row without any progress; the pause doubles from ``first_s`` up to ``most_s``.

    Up to half of a pause is left out at random, so that many boxes do not come back together.
    """

    tries: int = 6
    first_s: float = 1.0
    most_s: float = 60.0

    def pause_s(self, failures: int, asked_for_s: float | None) -> float:
        """Before the next try, after that many failures; not less than the origin asks for."""
        usual_s = min(self.most_s, self.first_s * 2.0 ** min(failures - 1, 30))
        usual_s *= random.uniform(0.5, 1.0)
        return min(self.most_s, max(usual_s, asked_for_s or 0.0))


def patiently(attempt: Callable[[], T], backoff: Backoff, done_bytes: Callable[[], int]) -> T:
    """Try until it succeeds, or has failed ``tries`` times without more bytes than ever before.

    Raises the last BrokenOffError; any other error at once.
    """
    failures, best_bytes = 0, done_bytes()
    while True:
        try:
            return attempt()
        except BrokenOffError as error:
            now_bytes = done_bytes()
            if now_bytes > best_bytes and not isinstance(error, FutileError):
                failures = 0
            best_bytes = max(best_bytes, now_bytes)
            failures += 1
            if failures >= backoff.tries:
                raise
            pause_s = backoff.pause_s(failures, error.retry_after_s)
            reason, seconds = error.message, round(pause_s, 2)
            _log.warning("download_interrupted", reason=reason, retry_in_s=seconds)
        time.sleep(pause_s)
