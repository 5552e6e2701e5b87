"""Models, ControlNets and LoRAs on their way into memory, and who waits for them.

All methods run on the engine's thread; only the reading itself happens on a thread of its own, one
asset at a time, so that requests for what is in memory go on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from experimance_controlnet.engine.faults import attempt, drop_frames, is_fatal, is_out_of_memory
from experimance_controlnet.engine.request import Asset
from experimance_controlnet.engine.runner import LoadSource, Runner

log = structlog.get_logger()

Waiter = Callable[[Exception | None], None]
"""Told on the engine's thread that the asset is there (None), or why it is not."""


@dataclass(frozen=True, slots=True)
class LoadTotal:
    """How often a model was brought to the device, and the seconds that took in all."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Loading:
    """What is on its way."""

    asset: Asset
    source: LoadSource
    begun_s: float | None
    """By the clock; None: it waits for its turn or for room."""


class Loads:
    """The loads under way."""

    def __init__(
        self,
        runner: Runner,
        post: Callable[[Callable[[], None]], None],
        needed_beside: Callable[[Asset], set[Asset]],
        others_run: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        """``post`` puts work into the engine's inbox; it is the only thing that the reading thread
        calls. ``needed_beside`` says what must stay in memory when an asset comes, ``others_run``
        whether requests are under way: when they end, more can leave. ``clock`` in seconds.
        """
        self._runner = runner
        self._post = post
        self._needed_beside = needed_beside
        self._others_run = others_run
        self._waiters: dict[Asset, list[Waiter]] = {}  # the first is the next
        self._reading: Asset | None = None
        self.short_of_room = False
        """The next asset waits until no request is under way; then call :meth:`resume`."""
        self.totals: dict[tuple[str, LoadSource], LoadTotal] = {}
        """By model and where it came from, for statistics. Copy it on another thread, do not
        iterate."""
        self._clock = clock
        self._begun: Loading | None = None  # the latest

    @property
    def under_way(self) -> tuple[Loading, ...]:
        """All that is wanted and not on the device yet, in order. Safe on any thread."""
        begun, reading = self._begun, self._reading
        return tuple(
            begun
            if begun is not None and begun.asset == reading == asset
            else Loading(asset, self._runner.source(asset), begun_s=None)
            for asset in tuple(self._waiters)
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Models that are wanted and not in memory yet. Safe on any thread."""
        return tuple(asset.name for asset in tuple(self._waiters) if asset.kind == "model")

    @property
    def read_against(self) -> set[Asset]:
        """The model that must stay as long as a LoRA for it is being read."""
        if self._reading is None or self._reading.model is None:
            return set()
        return {Asset("model", self._reading.model)}

    def want(self, asset: Asset, waiter: Waiter) -> None:
        """Tell ``waiter`` as soon as the asset is in memory, which may be at once."""
        if self._runner.has(asset):
            waiter(None)
            return
        self._waiters.setdefault(asset, []).append(waiter)
        self._read_next()

    def withdraw(self, waiter: Waiter) -> None:
        """Tell this one nothing any more. What nobody else waits for is not read, unless that has
        begun.
        """
        for asset, waiters in tuple(self._waiters.items()):
            if waiter in waiters:
                waiters.remove(waiter)
                if not waiters and asset != self._reading:
                    del self._waiters[asset]
        if self.short_of_room:
            self._read_next()

    def resume(self) -> None:
        """Try anew: nothing runs any more that could make room."""
        self._read_next()

    def _read_next(self) -> None:
        self.short_of_room = False
        if self._reading is not None or not self._waiters:
            return
        asset = next(iter(self._waiters))
        if asset.model is not None and not self._runner.has(Asset("model", asset.model)):
            # Its model had to leave for another. Who waits asks for that one first.
            self._reading = asset
            self._post(partial(self._tell, asset, None))
            return
        error = attempt(partial(self._make_room, asset))
        if self.short_of_room:
            return
        self._begun = Loading(asset, self._runner.source(asset), self._clock())
        self._reading = asset
        if error is not None:  # it ends those who wait for this, and nobody else
            self._post(partial(self._done, asset, [], error))
            return
        # A daemon: a process that is told to stop must not wait for a disk.
        threading.Thread(target=self._read, args=(asset,), name="loader", daemon=True).start()

    def _make_room(self, asset: Asset) -> None:
        """When nothing else can leave, reading is tried all the same: what it takes is a guess."""
        enough = self._runner.make_room(asset, self._needed_beside(asset))
        self.short_of_room = not enough and self._others_run()

    def _read(self, asset: Asset) -> None:
        found: list[Any] = []
        failure: BaseException | None = None
        started_s = time.monotonic()
        try:
            found.append(self._runner.load(asset))
        except BaseException as error:  # noqa: BLE001 - top of this thread; the engine's judges it
            failure = error
        else:
            self._count(asset, time.monotonic() - started_s)
        self._post(partial(self._done, asset, found, failure))

    def _count(self, asset: Asset, load_s: float) -> None:
        assert self._begun is not None and self._begun.asset == asset
        source = self._begun.source
        if asset.kind == "model":
            total = self.totals.get((asset.name, source), LoadTotal())
            total = LoadTotal(total.count + 1, total.seconds + load_s)
            self.totals[asset.name, source] = total
        fields = {asset.kind: asset.name, "source": source, "load_s": round(load_s, 3)}
        log.info(f"{asset.kind}_loaded", **fields)

    def _done(self, asset: Asset, found: list[Any], error: BaseException | None) -> None:
        """``found`` has what was read, where there is no ``error``."""
        if error is None:
            # taken out: what is next may be in need of its memory, so nobody else must hold it
            self._runner.install(asset, found.pop())
        else:
            fields = {asset.kind: asset.name, "error": repr(error)}
            log.error(f"{asset.kind}_load_failed", **fields, exc_info=error)
            if not isinstance(error, Exception) or is_fatal(error):
                raise error
            drop_frames(error)  # which hold what was read
            if is_out_of_memory(error):
                self._runner.release_memory()
        self._tell(asset, error)

    def _tell(self, asset: Asset, error: Exception | None) -> None:
        waiters = self._waiters.pop(asset)
        before = {other: len(others) for other, others in self._waiters.items()}
        for waiter in waiters:
            waiter(error)
        # What these ask for next comes before the rest, for which this asset might have to leave:
        # requests that need several would push out each other's for ever.
        asked = {a for a, others in self._waiters.items() if len(others) > before.get(a, 0)}
        self._waiters = dict(sorted(self._waiters.items(), key=lambda item: item[0] not in asked))
        self._reading = None
        self._read_next()
