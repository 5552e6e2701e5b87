"""sha256 of weights, computed once: remembered in memory, and beside files that were downloaded.

A side file ``X.sha256`` says which state of X it speaks of (length, time of change), so a file
that somebody replaced is hashed again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

_DIGEST = re.compile("[0-9a-f]{64}")


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
    digest, state = _read_beside(path)
    return digest if digest is not None and state == _state(path) else None


def digest_beside(path: Path) -> str | None:
    """The hash that was remembered beside a file, whatever has happened to the file since."""
    return _read_beside(path)[0]


def _read_beside(path: Path) -> tuple[str | None, str]:
    """The hash, None where there is none, and the state that it is of."""
    try:
        note = side_file(path).read_text("ascii", errors="replace")
    except FileNotFoundError:
        return None, ""
    digest, _, state = note.strip().partition(" ")
    return digest if _DIGEST.fullmatch(digest) else None, state


class ContentHashes:
    """The hashes that were asked for, each valid as long as its file does not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], str] = {}

    def of(self, path: Path, *, keep_beside: bool) -> str | None:
        """sha256 of a file; of a folder over its weights' names and hashes, None without any."""
        return _over(path, lambda file: self._of_file(file, keep_beside))

    def known(self, path: Path, *, keep_beside: bool) -> str | None:
        """The same without reading any weights: None as long as nobody has computed it."""
        return _over(path, lambda file: self._known_of_file(file, keep_beside))

    def _of_file(self, path: Path, keep_beside: bool) -> str:
        digest = self._known_of_file(path, keep_beside)
        if digest is None:
            key = _key(path)
            digest = hash_file(path)
            if keep_beside and os.access(path.parent, os.W_OK):  # an image may hold it read-only
                remember_beside(path, digest)
            self._known[key] = digest
        return digest

    def _known_of_file(self, path: Path, keep_beside: bool) -> str | None:
        key = _key(path)
        digest = self._known.get(key) or (hash_beside(path) if keep_beside else None)
        if digest is not None:
            self._known[key] = digest
        return digest


def _over(path: Path, hash_of: Callable[[Path], str | None]) -> str | None:
    files = weight_files(path)
    if path.is_file():
        return hash_of(path)
    listing = hashlib.sha256()
    for file in files:
        digest = hash_of(file)
        if digest is None:
            return None
        listing.update(f"{digest}  {file.relative_to(path).as_posix()}\n".encode())
    return listing.hexdigest() if files else None


def _key(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_ino, stat.st_mtime_ns


def _state(path: Path) -> str:
    stat = path.stat()
    # whole seconds: images and archives do not keep more
    return f"{stat.st_size}-{int(stat.st_mtime)}"
