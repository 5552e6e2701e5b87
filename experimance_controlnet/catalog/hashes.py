"""sha256 of weights, computed once: remembered in memory, and beside files that were downloaded.

A side file ``X.sha256`` says which state of X it speaks of (length, time of change), so a file
that somebody replaced is hashed again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def weight_files(path: Path) -> list[Path]:
    """The file itself, or every .safetensors below a folder, sorted."""
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def hash_file(path: Path) -> str:
    """sha256 as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def side_file(path: Path) -> Path:
    """Where the hash of a downloaded file is remembered."""
    return path.with_name(path.name + ".sha256")


def remember_beside(path: Path, digest: str) -> None:
    """Write the side file of a file whose sha256 is known."""
    side_file(path).write_text(f"{digest} {_state(path)}\n")


def hash_beside(path: Path) -> str | None:
    """The hash that is remembered beside a file, if it is of the file as it is now."""
    beside = side_file(path)
    if not beside.is_file():
        return None
    digest, _, state = beside.read_text().strip().partition(" ")
    return digest if state == _state(path) else None


class ContentHashes:
    """The hashes that were asked for, each valid as long as its file does not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], str] = {}

    def of(self, path: Path, *, keep_beside: bool) -> str | None:
        """sha256 of a file; of a folder over its weights' names and hashes, None without any."""
        files = weight_files(path)
        if path.is_file():
            return self._of_file(path, keep_beside)
        listing = hashlib.sha256()
        for file in files:
            digest = self._of_file(file, keep_beside)
            listing.update(f"{digest}  {file.relative_to(path).as_posix()}\n".encode())
        return listing.hexdigest() if files else None

    def _of_file(self, path: Path, keep_beside: bool) -> str:
        stat = path.stat()
        key = (path, stat.st_ino, stat.st_mtime_ns)
        digest = self._known.get(key) or (hash_beside(path) if keep_beside else None)
        if digest is None:
            digest = hash_file(path)
            if keep_beside and os.access(path.parent, os.W_OK):  # an image may hold it read-only
                remember_beside(path, digest)
        self._known[key] = digest
        return digest


def _state(path: Path) -> str:
    stat = path.stat()
    # whole seconds: images and archives do not keep more
    return f"{stat.st_size}-{int(stat.st_mtime)}"
