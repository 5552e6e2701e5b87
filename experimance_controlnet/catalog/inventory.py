"""What is on this disk of a source, and whether it is what it should be. No network.

``glance`` reads no weights and is for whoever waits; ``verify`` reads every byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experimance_controlnet.catalog.hashes import (
    ContentHashes,
    digest_beside,
    hash_beside,
    hash_file,
    remember_beside,
    side_file,
)
from experimance_controlnet.catalog.location import is_remote, place_of
from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.errors import BadWeightsError


@dataclass(frozen=True, slots=True)
class Found:
    """What is on this disk. ``size_bytes`` of all its files; ``sha256`` as far as it is known."""

    path: Path
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file as it was found. ``fault`` says what is wrong with it; None: nothing.

    ``sha256`` is of what was read, of weights only; ``stated_by`` says who stated the one that it
    was compared with, the catalogue or the transfer that brought it; None: nobody.
    """

    path: Path
    size_bytes: int
    fault: str | None
    sha256: str | None = None
    stated_by: str | None = None


def glance(source: Source, models_dir: Path, hashes: ContentHashes) -> Found | None:
    """What is there, by names, lengths and hashes that are known already; None: nothing.

    A file of another length or hash than the catalogue states is nothing. Raises OSError.
    """
    path = place_of(source, models_dir)
    try:
        if not path.exists():
            return None
        size_bytes = sum(file.stat().st_size for file in content_files(path))
        digest = hashes.known(path, keep_beside=is_remote(source))
    except FileNotFoundError:  # removed in this moment
        return None
    if source.size_bytes not in (None, size_bytes):
        return None
    if source.sha256 is not None and digest not in (None, source.sha256):
        return None
    return Found(path, size_bytes, digest)


def content_files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder but those that remember hashes; sorted."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sides = {side_file(file) for file in files}
    return [file for file in files if file not in sides]


def verify(source: Source, path: Path, on_read: Callable[[int], None]) -> list[FileCheck]:
    """Check every file of a source that is at ``path``: length, form, sha256.

    ``on_read`` hears of bytes as they are read. The hash of a whole file is remembered beside a
    download, as after a transfer. Raises OSError.
    """
    if path.is_file():
        return [_check_weights(path, source, on_read)]
    part = Source(source.uri)  # what a catalogue states is of a single file
    return [
        _check_weights(file, part, on_read)
        if file.suffix == ".safetensors"
        else _check_text(file, on_read)
        for file in content_files(path)
    ]


def _check_weights(path: Path, source: Source, on_read: Callable[[int], None]) -> FileCheck:
    size_bytes = path.stat().st_size
    if source.size_bytes not in (None, size_bytes):
        on_read(size_bytes)
        return FileCheck(path, size_bytes, f"the catalogue says {source.size_bytes} bytes")
    try:
        verify_safetensors(path)
    except BadWeightsError as error:
        on_read(size_bytes)
        return FileCheck(path, size_bytes, error.message)
    digest = hash_file(path, on_read)
    remembered = digest_beside(path) if is_remote(source) else None
    statements = (("catalogue", source.sha256), ("transfer", remembered))
    for who, stated in statements:
        if stated not in (None, digest):
            fault = f"its sha256 is not the one of the {who}: the content has changed"
            return FileCheck(path, size_bytes, fault, digest, who)
    # beside it only where that is not yet known, and the disk is not read-only
    if is_remote(source) and hash_beside(path) is None and os.access(path.parent, os.W_OK):
        remember_beside(path, digest)
    stated_by = next((who for who, stated in statements if stated is not None), None)
    return FileCheck(path, size_bytes, None, digest, stated_by)


def _check_text(path: Path, on_read: Callable[[int], None]) -> FileCheck:
    """Of a configuration or vocabulary."""
    size_bytes = path.stat().st_size
    on_read(size_bytes)
    return FileCheck(path, size_bytes, _text_fault(path))


def _text_fault(path: Path) -> str | None:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            json.loads(text)
    except ValueError as error:
        return f"cannot be read as text: {error}"
    return None
