"""Where model files are on this disk, and how they get there.

A final name below MODELS_DIR appears only by an atomic rename of a complete, checked transfer, so
what exists there is whole. What a transfer left behind when the process was killed is in
``.partial-*`` folders.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import structlog

from experimance_controlnet.catalog.disk import disk_errors, flush
from experimance_controlnet.catalog.download import BrokenOffError, download_file
from experimance_controlnet.catalog.hashes import (
    ContentHashes,
    remember_beside,
    side_file,
    weight_files,
)
from experimance_controlnet.catalog.hub import download_from_hub
from experimance_controlnet.catalog.location import (
    HubPlace,
    LocalPlace,
    WebFile,
    locate,
    without_query,
)
from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.errors import BadWeightsError, ModelFileError

_log = structlog.get_logger()


class ModelStore:
    """The model files of one MODELS_DIR; safe to use from many threads.

    ``hub_endpoint`` replaces https://huggingface.co. ``retry_delays_s`` are the pauses before
    each further try after a fault that may pass.
    """

    def __init__(
        self,
        models_dir: Path,
        *,
        client: httpx.Client | None = None,
        hub_endpoint: str | None = None,
        retry_delays_s: Sequence[float] = (1.0, 4.0, 16.0),
    ) -> None:
        self.models_dir = models_dir
        # transfers are rare: no idle connections, so nothing that has to be closed
        self._client = client or httpx.Client(
            timeout=httpx.Timeout(30.0, connect=10.0),
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self._hub_endpoint = hub_endpoint
        self._retry_delays_s = tuple(retry_delays_s)
        self._hashes = ContentHashes()
        self._lock = threading.Lock()
        self._running: dict[Source, Future[Path]] = {}

    def is_remote(self, source: Source) -> bool:
        """Whether the source comes over the network."""
        return not isinstance(locate(source), LocalPlace)

    def path(self, source: Source) -> Path | None:
        """Where the whole file or folder is on this disk, without network; None: it is not.

        A file that is not the one the catalogue describes (length, sha256) counts as absent.
        """
        path = self._place(source)
        if not path.exists():
            return None
        if source.size_bytes is not None and source.size_bytes != path.stat().st_size:
            return None
        if source.sha256 is not None and source.sha256 != self._hash(source, path):
            return None
        return path

    def content_hash(self, source: Source) -> str | None:
        """sha256 of the file, or of a folder over its weights; None where it is not on disk."""
        path = self.path(source)
        return None if path is None else self._hash(source, path)

    def fetch(self, source: Source) -> Path:
        """Block until the file or folder is on this disk.

        However many threads ask, there is one transfer per source, and its result or its error is
        everybody's. Raises DownloadError, NotFoundUpstreamError, BadWeightsError, DiskFullError;
        ModelFileError for a local path that does not exist or a folder that cannot be written.
        """
        if (path := self.path(source)) is not None:
            return path
        with self._lock:
            others = self._running.get(source)
            if others is None:
                mine = self._running[source] = Future[Path]()
        if others is not None:
            return others.result()
        try:
            # again: the transfer of another thread may have ended between the look and the lock
            path = self.path(source) or self._transfer(source)
            mine.set_result(path)
            return path
        except ModelFileError as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[source]
            mine.cancel()  # only after an error that is none of ours: nobody may wait for ever

    def _place(self, source: Source) -> Path:
        place = locate(source)
        return place.path if isinstance(place, LocalPlace) else self.models_dir / place.keep_at

    def _hash(self, source: Source, path: Path) -> str | None:
        return self._hashes.of(path, keep_beside=self.is_remote(source))

    def _transfer(self, source: Source) -> Path:
        place = locate(source)
        if isinstance(place, LocalPlace):
            _log.error("local_file_unusable", path=str(place.path))
            raise ModelFileError(  # a client may read this: no path of this server
                f"{place.path.name} does not exist, or is not what the catalogue says"
            )
        target = self.models_dir / place.keep_at
        log = _log.bind(uri=without_query(source.uri))
        log.info("download_started", size_bytes=source.size_bytes)
        started_s = time.monotonic()
        try:
            with disk_errors(Path("MODELS_DIR", place.keep_at)):
                size_bytes = self._bring(place, source, target)
        except ModelFileError as error:
            seconds = round(time.monotonic() - started_s, 3)
            log.error("download_failed", code=error.code, reason=error.message, seconds=seconds)
            raise
        seconds = round(time.monotonic() - started_s, 3)
        log.info("download_finished", size_bytes=size_bytes, seconds=seconds)
        return target

    def _bring(self, place: WebFile | HubPlace, source: Source, target: Path) -> int:
        """Transfer, check, and only then give it its name; returns its size in bytes."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
            staged = self._pull_patiently(place, source, Path(partial))
            _check(source, staged)
            entries = [staged, *staged.rglob("*")]
            for entry in entries:
                flush(entry)
            size_bytes = sum(entry.stat().st_size for entry in entries if entry.is_file())
            os.replace(staged, target)
            if target.is_file():
                os.replace(side_file(staged), side_file(target))
        flush(target.parent)
        return size_bytes

    def _pull_patiently(self, place: WebFile | HubPlace, source: Source, folder: Path) -> Path:
        for delay_s in self._retry_delays_s:
            try:
                return self._pull(place, source, folder)
            except BrokenOffError as error:
                _log.warning("download_interrupted", reason=error.message, retry_in_s=delay_s)
                time.sleep(delay_s)
        return self._pull(place, source, folder)

    def _pull(self, place: WebFile | HubPlace, source: Source, folder: Path) -> Path:
        """One attempt; returns the file or folder in ``folder``, weights hashed."""
        if isinstance(place, WebFile):
            staged = folder / place.keep_at.name
            digest = download_file(self._client, place.url, staged, source.size_bytes)
            remember_beside(staged, digest)
            return staged
        snapshot = folder / "snapshot"
        download_from_hub(place, snapshot, files=source.files, endpoint=self._hub_endpoint)
        shutil.rmtree(snapshot / ".cache")  # the library's notes
        return snapshot / place.file if place.file else snapshot


def _check(source: Source, staged: Path) -> None:
    uri = without_query(source.uri)
    for file in weight_files(staged):
        verify_safetensors(file)
    if source.size_bytes is not None and source.size_bytes != staged.stat().st_size:
        raise BadWeightsError(f"{uri} does not have the length that the catalogue states")
    digest = ContentHashes().of(staged, keep_beside=True)  # remembered when it was pulled
    if source.sha256 is not None and source.sha256 != digest:
        raise BadWeightsError(f"{uri} does not have the sha256 that the catalogue states")
