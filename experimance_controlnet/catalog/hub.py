"""One attempt to bring a repository of the Hugging Face Hub, or one file of it.

Not through ``snapshot_download``: when the Hub does not answer, that returns whatever part of the
folder is there as if it were all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2  # what huggingface_hub speaks and lets its errors through from
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import disable_progress_bars

from experimance_controlnet.catalog.disk import check_free_space
from experimance_controlnet.catalog.download import BrokenOffError, status_error
from experimance_controlnet.catalog.hashes import hash_file, remember_beside
from experimance_controlnet.catalog.location import HubPlace
from experimance_controlnet.errors import BadWeightsError, DownloadError, NotFoundUpstreamError

_TIMEOUT_S = 10.0
_SAFE_SUFFIXES = (".safetensors", ".json", ".txt")


def download_from_hub(
    place: HubPlace, folder: Path, *, files: Sequence[str], endpoint: str | None
) -> None:
    """Bring the wanted files into ``folder``, laid out as in the repository, and hash the weights.

    ``files`` are glob patterns, empty for all; only safetensors, json and txt ever come, and each
    pattern must find one. Files of an earlier attempt stay and are not sent again. Errors as
    ``download.download_file``.
    """
    label = f"hf://{place.repo}@{place.revision}"
    disable_progress_bars("huggingface_hub")
    with _hub_errors(label):
        info = HfApi(endpoint=endpoint).model_info(
            place.repo, revision=place.revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    patterns = [place.file] if place.file else files or ["*"]
    wanted = _wanted(info.siblings or [], patterns)
    for pattern in patterns:
        if not any(fnmatchcase(sibling.rfilename, pattern) for sibling in wanted):
            raise NotFoundUpstreamError(f"{label}: holds no weights or texts named {pattern}")
    check_free_space(folder.parent, sum(sibling.size or 0 for sibling in wanted))
    for sibling in wanted:
        with _hub_errors(f"{label}/{sibling.rfilename}"):
            hf_hub_download(
                place.repo,
                sibling.rfilename,
                revision=info.sha,  # every file from one commit
                local_dir=folder,
                endpoint=endpoint,
            )
        _check_hash(sibling, folder / sibling.rfilename)


def _wanted(siblings: Sequence[RepoSibling], patterns: Sequence[str]) -> list[RepoSibling]:
    return [
        sibling
        for sibling in siblings
        if (name := sibling.rfilename).endswith(_SAFE_SUFFIXES)
        and not {"", ".", ".."} & set(name.split("/"))
        and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _check_hash(sibling: RepoSibling, path: Path) -> None:
    if path.suffix != ".safetensors":
        return
    digest = hash_file(path)
    if sibling.lfs is not None and sibling.lfs.sha256 != digest:
        raise BadWeightsError(f"{sibling.rfilename} arrived damaged: its sha256 is not the Hub's")
    remember_beside(path, digest)


@contextmanager
def _hub_errors(label: str) -> Iterator[None]:
    """Turn the library's errors into ours; faults of this disk pass as OSError."""
    try:
        yield
    except HfHubHTTPError as error:
        raise status_error(label, error.response.status_code) from error
    except HFValidationError as error:
        raise DownloadError(f"{label}: {error}") from error
    except (httpx2.TransportError, RuntimeError) as error:  # RuntimeError: hf_xet's transfers
        raise BrokenOffError(f"{label}: {str(error) or type(error).__name__}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # the library's own: not reachable, offline mode, inconsistent length
        raise BrokenOffError(f"{label}: {str(error).splitlines()[0]}") from error
