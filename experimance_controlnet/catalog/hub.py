"""A repository of the Hugging Face Hub, or one file of it.

huggingface_hub says which files there are and which token is used; they are fetched as every other
file. Its own downloads do not suit: they throw away what they have of a file when they are cut off
or killed, and ``snapshot_download`` returns whatever part of a folder is there when the Hub does
not answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2  # what huggingface_hub speaks and lets its errors through from
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoSibling

from experimance_controlnet.catalog.answers import BrokenOffError, status_error
from experimance_controlnet.catalog.disk import check_free_space
from experimance_controlnet.catalog.hashes import hash_beside, remember_beside
from experimance_controlnet.catalog.job import Order
from experimance_controlnet.catalog.location import HubPlace
from experimance_controlnet.catalog.progress import Transfer
from experimance_controlnet.errors import (
    ChecksumMismatchError,
    DownloadError,
    NotFoundUpstreamError,
)

_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40,64}", re.ASCII)
_SAFE_SUFFIXES = (".safetensors", ".json", ".txt")

Fetch = Callable[[Order, Path], str]
"""Brings a file to just this path, whole; returns its sha256."""


class Repository:
    """The wanted files of a repository, all of one commit."""

    def __init__(self, place: HubPlace, files: Sequence[str], endpoint: str | None) -> None:
        """Ask the Hub. ``files`` are glob patterns, empty for all; each must find one.

        Only safetensors, json and txt are ever wanted. Raises BrokenOffError,
        NotFoundUpstreamError, DownloadError.
        """
        self._label = f"hf://{place.repo}@{place.revision}"
        self._repo = place.repo
        self._endpoint = endpoint
        with _hub_errors(self._label):
            info = HfApi(endpoint=endpoint).model_info(
                place.repo, revision=place.revision, files_metadata=True, timeout=_TIMEOUT_S
            )
        if info.sha is None or not _COMMIT.fullmatch(info.sha):  # it becomes a folder's name
            raise DownloadError(f"{self._label}: the Hub does not say which commit it is")
        self.commit = info.sha
        patterns = [place.file] if place.file else files or ["*"]
        self._wanted = _wanted(info.siblings or [], patterns)
        for pattern in patterns:
            if not any(fnmatchcase(sibling.rfilename, pattern) for sibling in self._wanted):
                raise NotFoundUpstreamError(
                    f"{self._label}: holds no weights or texts named {pattern}"
                )

    def download(self, folder: Path, fetch: Fetch, transfer: Transfer) -> None:
        """Bring them into ``folder``, laid out as in the repository; what is there stays.

        Raises what ``fetch`` raises; ChecksumMismatchError, DiskFullError.
        """
        missing = [sibling for sibling in self._wanted if not _is_there(sibling, folder)]
        transfer.plan(sum(sibling.size or 0 for sibling in self._wanted))
        check_free_space(folder, sum(sibling.size or 0 for sibling in missing) - _held(folder))
        for sibling in self._wanted:
            path = folder / sibling.rfilename
            if sibling not in missing:
                transfer.begin_file(sibling.size, sibling.size or 0)
                transfer.end_file()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = fetch(self._order(sibling), path)
            if sibling.lfs is None and sibling.blob_id not in (None, _git_hash(path.read_bytes())):
                raise ChecksumMismatchError(
                    f"{self._label}/{sibling.rfilename} arrived damaged: its hash is not the "
                    "Hub's; fetch it again"
                )
            if path.suffix == ".safetensors":
                remember_beside(path, digest)

    def _order(self, sibling: RepoSibling) -> Order:
        name = sibling.rfilename
        url = hf_hub_url(self._repo, name, revision=self.commit, endpoint=self._endpoint)
        sha256 = None if sibling.lfs is None else sibling.lfs.sha256
        return Order(f"{self._label}/{name}", url, sibling.size, sha256)


def _wanted(siblings: Sequence[RepoSibling], patterns: Sequence[str]) -> list[RepoSibling]:
    return [
        sibling
        for sibling in siblings
        if (name := sibling.rfilename).endswith(_SAFE_SUFFIXES)
        and not {"", ".", ".."} & set(name.split("/"))
        and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _is_there(sibling: RepoSibling, folder: Path) -> bool:
    """Whether an earlier call has brought it whole: then its hash is beside it."""
    path = folder / sibling.rfilename
    if not path.is_file() or path.stat().st_size != sibling.size:
        return False
    if sibling.lfs is not None:
        return hash_beside(path) == sibling.lfs.sha256
    return path.suffix != ".safetensors" and sibling.blob_id == _git_hash(path.read_bytes())


def _held(folder: Path) -> int:
    """What files that are not whole yet take of the disk."""
    return sum(
        path.stat().st_blocks * 512
        for path in folder.rglob(".partial-*/*")
        if path.is_file() and not path.is_symlink()
    )


def _git_hash(content: bytes) -> str:
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


@contextmanager
def _hub_errors(label: str) -> Iterator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except HfHubHTTPError as error:
        response = error.response
        raise status_error(
            label, response.status_code, response.headers.get("Retry-After")
        ) from error
    except HFValidationError as error:
        raise DownloadError(f"{label}: {error}") from error
    except (httpx2.TransportError, OSError) as error:
        # OSError: the library's own, where the Hub cannot be reached or must not
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BrokenOffError(f"{label}: {reason}; check the network") from error
