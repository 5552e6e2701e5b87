"""Where model files are on this disk, and how they get there.

A final name below MODELS_DIR appears only by an atomic rename of a complete, checked transfer, so
what exists there is whole. What is on its way is in a folder ``.partial-NAME`` beside it, with
``.partial-NAME.lock`` as long as some process works on it. The folder of a transfer that was cut
off or killed stays, and the next one goes on with it; nothing else ever reads it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import structlog
from huggingface_hub import constants, get_token

from experimance_controlnet.catalog.backoff import patiently
from experimance_controlnet.catalog.disk import disk_errors, flush, remove_whole
from experimance_controlnet.catalog.hashes import (
    ContentHashes,
    remember_beside,
    side_file,
    weight_files,
)
from experimance_controlnet.catalog.hub import Repository
from experimance_controlnet.catalog.inventory import Found, glance
from experimance_controlnet.catalog.job import Manner, Order
from experimance_controlnet.catalog.location import (
    GCS_URL,
    HubPlace,
    LocalPlace,
    WebFile,
    is_remote,
    locate,
    place_of,
    without_query,
)
from experimance_controlnet.catalog.lock import file_lock
from experimance_controlnet.catalog.progress import Progress, Transfer, TransferStatus
from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.transfer import fetch_file
from experimance_controlnet.catalog.web import Http, Web
from experimance_controlnet.errors import (
    BadWeightsError,
    ChecksumMismatchError,
    DownloadError,
    FileInUseError,
    ModelFileError,
)

_log = structlog.get_logger()


class ModelStore:
    """The model files of one MODELS_DIR; safe to use from many threads, and by many processes.

    ``tokens`` are access tokens by host, see ``web.Web``; that of the Hugging Face Hub is found by
    its library. ``hub_endpoint`` and ``gcs_endpoint`` replace https://huggingface.co and
    https://storage.googleapis.com, ``http`` the connections.
    """

    def __init__(
        self,
        models_dir: Path,
        *,
        tokens: Mapping[str, str] | None = None,
        hub_endpoint: str | None = None,
        gcs_endpoint: str | None = None,
        http: Http | None = None,
        manner: Manner | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.models_dir = models_dir
        self._tokens = dict(tokens or {})
        self._hub_endpoint = hub_endpoint
        self._gcs_endpoint = gcs_endpoint
        self._http = http
        self._manner = manner or Manner()
        self._progress = progress or Progress()
        self._hashes = ContentHashes()
        self._lock = threading.Lock()
        self._running: dict[Source, Future[Path]] = {}

    def downloads(self) -> list[TransferStatus]:
        """How far the transfers are that this process runs at the moment."""
        return self._progress.running()

    def is_remote(self, source: Source) -> bool:
        """Whether the source comes over the network."""
        return is_remote(source)

    def path(self, source: Source) -> Path | None:
        """Where the whole file or folder is on this disk, without network; None: it is not.

        A file that is not the one the catalogue describes (length, sha256) counts as absent.
        """
        path = place_of(source, self.models_dir)
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

    def glance(self, source: Source) -> Found | None:
        """What is on this disk, without reading weights: see ``inventory.glance``."""
        return glance(source, self.models_dir, self._hashes)

    def remove(self, source: Source) -> int:
        """Remove a download and what a transfer left of it; returns the bytes of disk freed.

        Raises ModelFileError for what is not a download, FileInUseError while a transfer works on
        it, in whatever process.
        """
        place = locate(source)
        if isinstance(place, LocalPlace):
            raise ModelFileError(
                f"{without_query(source.uri)} was not downloaded: remove it by hand"
            )
        target = self.models_dir / place.keep_at
        with disk_errors(Path("MODELS_DIR", place.keep_at)):
            partial = _beside(target, self.models_dir)
            if not target.parent.is_dir():
                return 0
            lock = partial.with_name(partial.name + ".lock")
            with file_lock(lock, lambda: _refuse_removal(source)):
                return sum(map(remove_whole, (target, side_file(target), partial)))

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
        started_s = time.monotonic()
        try:
            with disk_errors(Path("MODELS_DIR", place.keep_at)):
                partial = _beside(target, self.models_dir)
                target.parent.mkdir(parents=True, exist_ok=True)
                lock = partial.with_name(partial.name + ".lock")
                with file_lock(lock, lambda: log.info("download_awaited")):
                    if (path := self.path(source)) is not None:  # another process has brought it
                        return path
                    log.info("download_started", size_bytes=source.size_bytes)
                    size_bytes = self._bring(place, source, target, partial)
        except ModelFileError as error:
            seconds = round(time.monotonic() - started_s, 3)
            log.error("download_failed", code=error.code, reason=error.message, seconds=seconds)
            raise
        seconds = round(time.monotonic() - started_s, 3)
        log.info("download_finished", size_bytes=size_bytes, seconds=seconds)
        return target

    def _bring(self, place: WebFile | HubPlace, source: Source, target: Path, partial: Path) -> int:
        """Transfer, check, and only then give it its name; returns its size in bytes."""
        try:
            with self._progress.transfer(str(place.keep_at)) as transfer:
                staged = self._pull(place, source, partial, transfer)
            _check(source, staged)
        except DownloadError:  # what came is of use for the next time
            if not any(path.is_file() for path in partial.rglob("*")):
                _remove(partial)
            raise
        except (ModelFileError, OSError):
            _remove(partial)
            raise
        entries = [staged, *staged.rglob("*")]
        for entry in entries:
            flush(entry)
        size_bytes = sum(entry.stat().st_size for entry in entries if entry.is_file())
        os.replace(staged, target)
        if target.is_file():
            os.replace(side_file(staged), side_file(target))
        flush(target.parent)
        _remove(partial)
        return size_bytes

    def _pull(
        self, place: WebFile | HubPlace, source: Source, partial: Path, transfer: Transfer
    ) -> Path:
        """Returns the file or folder in ``partial``, weights hashed."""
        tokens = dict(self._tokens)
        hub_host = urlsplit(self._hub_endpoint or constants.ENDPOINT).netloc
        if (token := get_token()) is not None:
            tokens[hub_host] = token
        with closing(Web(tokens, self._http, silence_s=self._manner.silence_s)) as web:
            if isinstance(place, WebFile):
                staged = partial / place.keep_at.name
                order = Order(
                    without_query(source.uri), self._url(place), source.size_bytes, source.sha256
                )
                digest = fetch_file(order, staged, web, transfer, self._manner)
                remember_beside(staged, digest)
                return staged

            def fetch(order: Order, path: Path) -> str:
                own = _beside(path, partial)
                digest = fetch_file(order, own / path.name, web, transfer, self._manner)
                os.replace(own / path.name, path)
                shutil.rmtree(own)
                return digest

            repository = patiently(
                lambda: Repository(place, source.files, self._hub_endpoint),
                self._manner.backoff,
                lambda: 0,
            )
            snapshot = partial / repository.commit
            _keep_only(snapshot)
            repository.download(snapshot, fetch, transfer)
            return snapshot / place.file if place.file else snapshot

    def _url(self, place: WebFile) -> str:
        if self._gcs_endpoint is not None and place.url.startswith(GCS_URL + "/"):
            return self._gcs_endpoint + place.url.removeprefix(GCS_URL)
        return place.url


def _beside(path: Path, top: Path) -> Path:
    """Where a file or folder is while it arrives. Raises ModelFileError where that is not below
    ``top``: links could lead a transfer into a folder that is somebody else's.
    """
    partial = path.with_name(f".partial-{path.name}")
    if not partial.resolve().is_relative_to(top.resolve()):
        raise ModelFileError(
            f"{path.name} would be written outside MODELS_DIR: a folder on its way there is a "
            "symbolic link; remove the link, or set MODELS_DIR to the folder itself"
        )
    return partial


def _refuse_removal(source: Source) -> NoReturn:
    raise FileInUseError(
        f"{without_query(source.uri)} is on its way just now: stop that transfer, or wait for it"
    )


def _remove(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)


def _keep_only(snapshot: Path) -> None:
    """Make the folder of a commit; what was begun of other commits goes."""
    snapshot.mkdir(parents=True, exist_ok=True)
    for other in snapshot.parent.iterdir():
        if other != snapshot:
            shutil.rmtree(other)


def _check(source: Source, staged: Path) -> None:
    uri = without_query(source.uri)
    for file in weight_files(staged):
        verify_safetensors(file)
    if source.size_bytes is not None and source.size_bytes != staged.stat().st_size:
        raise BadWeightsError(f"{uri} does not have the length that the catalogue states")
    digest = ContentHashes().of(staged, keep_beside=True)  # remembered when it was pulled
    if source.sha256 is not None and source.sha256 != digest:
        raise ChecksumMismatchError(
            f"{uri} does not have the sha256 that the catalogue states: fetch it again, or correct "
            "the catalogue"
        )
