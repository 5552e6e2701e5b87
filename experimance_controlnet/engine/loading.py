"""Models, ControlNets and LoRAs on their way into memory, and who waits for them.

All methods run on the engine's thread; only the reading itself happens on a thread of its own, one
asset at a time, so that requests for what is in memory go on meanwhile.
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

from experimance_controlnet.engine.faults import is_fatal
from experimance_controlnet.engine.request import Asset
from experimance_controlnet.engine.runner import Runner

log = structlog.get_logger()

Waiter = Callable[[Exception | None], None]
"""Told on the engine's thread that the asset is there (None), or why it is not."""


@dataclass(frozen=True, slots=True)
class LoadTotal:
    """How often a model was read into memory, and the seconds that took in all."""

    count: int = 0
    seconds: float = 0.0


class Loads:
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
        self._waiters: dict[Asset, list[Waiter]] = {}  # in order of the first wish
        self._reading: Asset | None = None
        self.totals: dict[str, LoadTotal] = {}
        """By model, for statistics. Copy it on another thread, do not iterate."""

    @property
    def models(self) -> tuple[str, ...]:
        """Models that are wanted and not in memory yet. Safe on any thread."""
        return tuple(asset.name for asset in tuple(self._waiters) if asset.kind == "model")

    def want(self, asset: Asset, waiter: Waiter) -> None:
        """Tell ``waiter`` as soon as the asset is in memory, which may be at once."""
        if self._runner.has(asset):
            waiter(None)
            return
        self._waiters.setdefault(asset, []).append(waiter)
        self._read_next()

    def _read_next(self) -> None:
        if self._reading is not None or not self._waiters:
            return
        self._reading = asset = next(iter(self._waiters))
        try:
            self._runner.make_room(asset, in_use=self._models_in_use() - {asset.name})
        except Exception as error:  # it ends those who wait for this, and nobody else
            if is_fatal(error):
                raise
            failed: Future[Any] = Future()
            failed.set_exception(error)
            self._post(partial(self._done, asset, failed))
            return
        # A daemon: a process that is told to stop must not wait for a disk.
        threading.Thread(target=self._read, args=(asset,), name="loader", daemon=True).start()

    def _read(self, asset: Asset) -> None:
        loaded: Future[Any] = Future()
        started_s = time.monotonic()
        try:
            loaded.set_result(self._runner.load(asset))
        except BaseException as error:  # noqa: BLE001 - top of this thread; the engine's judges it
            loaded.set_exception(error)
        else:
            self._count(asset, time.monotonic() - started_s)
        self._post(partial(self._done, asset, loaded))

    def _count(self, asset: Asset, load_s: float) -> None:
        if asset.kind == "model":
            total = self.totals.get(asset.name, LoadTotal())
            self.totals[asset.name] = LoadTotal(total.count + 1, total.seconds + load_s)
        fields = {asset.kind: asset.name, "load_s": round(load_s, 3)}
        log.info(f"{asset.kind}_loaded", **fields)

    def _done(self, asset: Asset, loaded: Future[Any]) -> None:
        waiters = self._waiters.pop(asset)
        self._reading = None
        error = loaded.exception()
        if error is None:
            self._runner.install(asset, loaded.result())
        else:
            fields = {asset.kind: asset.name, "error": repr(error)}
            log.error(f"{asset.kind}_load_failed", **fields, exc_info=error)
            if not isinstance(error, Exception) or is_fatal(error):
                raise error
        for waiter in waiters:
            waiter(error)
        self._read_next()
