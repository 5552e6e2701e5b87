"""Bars on a terminal's stderr; where that is none, the log's events as lines."""

from __future__ import annotations

import logging
from pathlib import Path

import structlog
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from structlog.types import EventDict, WrappedLogger

from experimance_controlnet.catalog.progress import TransferStatus
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.threads import on_daemon

_LOOK_EVERY_S = 0.1
_NEWS = ("download_awaited", "download_resumed", "download_begins_anew")
"""What a bar does not show."""


class TransferBars:
    """Fetches with a bar for each transfer, which goes when it ends: results have stdout alone."""

    def __init__(self, store: ModelStore) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._store = store

    def fetch(self, source: Source) -> Path:
        """Block until it is on this disk; raises as ``ModelStore.fetch`` does."""
        future = on_daemon(lambda: self._store.fetch(source), "fetch")
        tasks: dict[str, TaskID] = {}
        with self._progress() as progress:
            while not future.done():
                _show(progress, tasks, self._store.downloads())
                try:
                    future.exception(timeout=_LOOK_EVERY_S)
                except TimeoutError:
                    continue
        return future.result()

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            console=self.console,
            transient=True,
            redirect_stdout=False,
            disable=not self.console.is_terminal,
        )


def _show(progress: Progress, tasks: dict[str, TaskID], running: list[TransferStatus]) -> None:
    for now in running:
        if now.name not in tasks:
            description = escape(now.name.rpartition("/")[2])
            tasks[now.name] = progress.add_task(description, rate="")
        progress.update(
            tasks[now.name],
            total=now.total_bytes,
            completed=now.done_bytes,
            rate=_rate_text(now),
        )


def show_events(console: Console) -> None:
    """Route the log of this process to the console: news only where there are bars.

    Errors are left out: they are raised, and told by whoever catches them.
    """

    def choose(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
        wanted = event["event"] in _NEWS or not console.is_terminal
        if not wanted or name == "error":
            raise structlog.DropEvent
        return event

    structlog.configure(
        processors=[choose, structlog.processors.KeyValueRenderer(key_order=["event"])],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *arguments: _ConsoleLogger(console),
    )
    for library in ("urllib3", "huggingface_hub"):  # a warning of theirs can hold a token
        logging.getLogger(library).setLevel(logging.ERROR)


class _ConsoleLogger:
    """What structlog writes to."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def msg(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)

    info = warning = error = msg


def _rate_text(now: TransferStatus) -> str:
    if now.bytes_per_s <= 0:
        return ""
    rate = f"{now.bytes_per_s / 1e6:.1f} MB/s"
    if now.total_bytes is None:
        return rate
    minutes, seconds = divmod(round((now.total_bytes - now.done_bytes) / now.bytes_per_s), 60)
    return f"{rate}, {minutes}:{seconds:02} left"
