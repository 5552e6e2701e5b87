"""What a source's URI means: checked, without touching network or disk.

Downloads keep a readable place below MODELS_DIR that no URI can leave::

    https://HOST/a/b.safetensors    HOST/a/b.safetensors
    gs://bucket/a/b.safetensors     storage.googleapis.com/bucket/a/b.safetensors
    hf://owner/repo                 huggingface.co/owner/repo@main[.HASH of ``files``]
    hf://owner/repo/f.safetensors   huggingface.co/owner/repo@main.files/f.safetensors
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.errors import CatalogError

GCS_URL = "https://storage.googleapis.com"
"""Where the objects of Google's buckets are, each as ``/BUCKET/OBJECT``."""
_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_OUR_PREFIXES = (".partial-", ".removed-")
"""What the store keeps beside a file, and must not be taken for one."""
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_SEGMENT = re.compile(r"[A-Za-z0-9_.~+%@(),;=:-]{1,200}")
_GCS_URI = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])/(.+)", re.ASCII)
_HUB_URI = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A file or folder that is on this disk or nowhere."""

    path: Path


@dataclass(frozen=True, slots=True)
class WebFile:
    """One safetensors file behind a URL; ``keep_at`` is its place below MODELS_DIR."""

    url: str
    keep_at: PurePosixPath


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A repository of the Hugging Face Hub, or the one ``file`` of it; kept as a WebFile is."""

    repo: str
    revision: str
    file: str | None
    keep_at: PurePosixPath


def locate(source: Source) -> LocalPlace | WebFile | HubPlace:
    """Read a source's URI. Raises CatalogError where it is none, or must not be used."""
    uri = source.uri
    if not uri or not uri.isprintable():
        raise CatalogError("is empty, or holds characters that cannot be seen")
    if uri.partition("?")[0].lower().endswith(_PICKLE_SUFFIXES):
        raise CatalogError("weights must be safetensors: such a file can run code when it is read")
    if uri.startswith("package:"):
        return LocalPlace(_EMBEDDED_FOLDER.joinpath(*_segments(uri.removeprefix("package:"))))
    if uri.startswith("hf://"):
        return _locate_on_hub(source)
    if uri.startswith("gs://"):
        return _locate_in_bucket(uri)
    if uri.startswith(("https://", "http://")):
        return _locate_on_web(uri)
    if _SCHEME.match(uri):
        raise CatalogError(
            "must be package:NAME, https://..., gs://bucket/object, hf://owner/repo or a local path"
        )
    return LocalPlace(Path(uri))


def without_query(uri: str) -> str:
    """The part of a URI that may be shown: a query can hold a token."""
    return uri.partition("?")[0]


def place_of(source: Source, models_dir: Path) -> Path:
    """Where its file or folder is, or would be. Raises CatalogError."""
    place = locate(source)
    return place.path if isinstance(place, LocalPlace) else models_dir / place.keep_at


def is_remote(source: Source) -> bool:
    """Whether the source comes over the network. Raises CatalogError."""
    return not isinstance(locate(source), LocalPlace)


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine, and so may be asked over plain http."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _locate_on_web(uri: str) -> WebFile:
    try:
        url = urlsplit(uri)
        host, port = url.hostname or "", url.port
    except ValueError as error:
        raise CatalogError(f"is not a URL: {error}") from error
    if url.scheme == "http" and not is_loopback(host):
        raise CatalogError("must be https")
    if "@" in url.netloc:
        raise CatalogError("must not hold a user name or password")
    *folders, name = _segments(url.path.removeprefix("/"))
    if url.query:  # two queries are two files
        name += "-" + _short_hash(url.query)
    if not name.endswith(".safetensors"):
        name += ".safetensors"
    place = host.replace(":", "_") + (f"_{port}" if port else "")
    return WebFile(uri, PurePosixPath(*_segments(place), *folders, name))


def _locate_in_bucket(uri: str) -> WebFile:
    match = _GCS_URI.fullmatch(uri)
    if match is None:
        raise CatalogError("must look like gs://bucket/object")
    return _locate_on_web(f"{GCS_URL}/{match[1]}/{quote(match[2])}")


def _locate_on_hub(source: Source) -> HubPlace:
    match = _HUB_URI.fullmatch(source.uri)
    if match is None:
        raise CatalogError("must look like hf://owner/repo[/file][@revision]")
    repo, file, revision = match[1], match[2], match[3] or "main"
    place = PurePosixPath("huggingface.co", *_segments(repo))
    place = place.with_name(f"{place.name}@{quote(revision, safe='')}")
    if file is not None:
        if not file.endswith(".safetensors"):
            raise CatalogError("a single file of a repository must be a .safetensors file")
        place = place.with_name(place.name + ".files").joinpath(*_segments(file))
    elif source.files:
        place = place.with_name(f"{place.name}.{_short_hash(*source.files)}")
    return HubPlace(repo, revision, file, place)


def _segments(path: str) -> list[str]:
    """The parts of a path, each a plain name. They stay percent-encoded on disk."""
    segments = path.split("/")
    for segment in segments:
        plain = _SEGMENT.fullmatch(segment) and unquote(segment) not in (".", "..")
        if not plain or segment.startswith(_OUR_PREFIXES):
            raise CatalogError(f"{segment!r} cannot be a part of its path")
    return segments


def _short_hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
