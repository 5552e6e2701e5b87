"""Models on their way into memory, and who waits for them.

All methods run on the engine's thread; only the reading itself happens on a thread of its own, one
model at a time, so that requests for models in memory go on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from experimance_controlnet.engine.runner import Runner

log = structlog.get_logger()

Waiter = Callable[[Exception | None], None]
"""Told on the engine's thread that the model is there (None), or why it is not."""


@dataclass(frozen=True, slots=True)
class LoadTotal:
    """How often a model was read into memory, and the seconds that took in all."""

    count: int = 0
    seconds: float = 0.0


class ModelLoads:
    """The loads under way."""

    def __init__(
        self,
        runner: Runner,
        post: Callable[[Callable[[], None]], None],
        models_in_use: Callable[[], set[str]],
    ) -> None:
        """``post`` puts work into the engine's inbox; it is the only thing that the reading thread
        calls.
        """
        self._runner = runner
        self._post = post
        self._models_in_use = models_in_use
        self._waiters: dict[str, list[Waiter]] = {}  # in order of the first wish
        self._reading: str | None = None
        self.totals: dict[str, LoadTotal] = {}
        """By model, for statistics. Copy it on another thread, do not iterate."""

    @property
    def models(self) -> tuple[str, ...]:
        """Models that are wanted and not in memory yet. Safe on any thread."""
        return tuple(self._waiters)

    def want(self, model: str, waiter: Waiter) -> None:
        """Tell ``waiter`` as soon as the model is in memory, which may be at once."""
        if model in self._runner.loaded_models:
            waiter(None)
            return
        self._waiters.setdefault(model, []).append(waiter)
        self._read_next()

    def _read_next(self) -> None:
        if self._reading is not None or not self._waiters:
            return
        self._reading = model = next(iter(self._waiters))
        self._runner.make_room(model, in_use=self._models_in_use() - {model})
        # A daemon: a process that is told to stop must not wait for a disk.
        threading.Thread(target=self._read, args=(model,), name="model-loader", daemon=True).start()

    def _read(self, model: str) -> None:
        loaded: Future[Any] = Future()
        started_s = time.monotonic()
        try:
            loaded.set_result(self._runner.load(model))
        except Exception as error:  # noqa: BLE001 - top of this thread; the engine's judges it
            loaded.set_exception(error)
        else:
            load_s = time.monotonic() - started_s
            total = self.totals.get(model, LoadTotal())
            self.totals[model] = LoadTotal(total.count + 1, total.seconds + load_s)
            log.info("model_loaded", model=model, load_s=round(load_s, 3))
        self._post(partial(self._done, model, loaded))

    def _done(self, model: str, loaded: Future[Any]) -> None:
        waiters = self._waiters.pop(model)
        self._reading = None
        error = loaded.exception()
        if error is None:
            self._runner.install(model, loaded.result())
        else:
            log.error("model_load_failed", model=model, error=repr(error), exc_info=error)
        for waiter in waiters:
            waiter(error if isinstance(error, Exception) else None)
        self._read_next()
