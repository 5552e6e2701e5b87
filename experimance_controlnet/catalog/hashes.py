"""sha256 of weights, computed once: remembered in memory, beside files that were downloaded, and in
notes of our own for files that somebody else has put where they are.

A side file ``X.sha256`` says which state of X it speaks of (length, time of change), and so does a
note: a file that somebody replaced is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

_log = structlog.get_logger()

_CHUNK_BYTES = 32 << 20
"""Between two chunks a thread needs the GIL, for which it waits up to 5 ms while another imports or
computes in Python. With small chunks a hash would wait for the imports of a start to end."""

_DIGEST = re.compile("[0-9a-f]{64}")


def weight_files(path: Path) -> list[Path]:
    """The file itself, or every .safetensors below a folder, sorted."""
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def hash_file(path: Path, on_read: Callable[[int], None] = lambda size: None) -> str:
    """sha256 as lower-case hex. ``on_read`` hears of bytes as they are read."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            on_read(size)
    return digest.hexdigest()


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
            unchanged = _key(path) == key  # what was replaced meanwhile is not what was hashed
            # an image may hold it read-only
            if keep_beside and unchanged and os.access(path.parent, os.W_OK):
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


class HashNotes:
    """Hashes that outlive the process, for files and folders that may not be written to.

    One note a path, in a folder of ours. Safe to use from many threads and processes.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when there is something to note."""
        self._folder = folder

    def of(self, path: Path, compute: Callable[[], str | None]) -> str | None:
        """The hash that was noted, as long as no weight file changes; else ``compute``'s, noted.

        A note that cannot be written is logged: the next start then computes it again.
        """
        states = _states(path)
        note = self._folder / (hashlib.sha256(str(path.absolute()).encode()).hexdigest() + ".json")
        known = _read_note(note)
        noted = known.get("hash")
        if known.get("files") == states and isinstance(noted, str):
            return noted
        digest = compute()
        if digest is not None and _states(path) == states:  # else it speaks of neither state
            content = {"path": str(path.absolute()), "hash": digest, "files": states}
            try:
                self._write(note, json.dumps(content, indent=1))
            except OSError as error:
                _log.warning("hash_not_noted", path=str(path), reason=error.strerror)
        return digest

    def _write(self, note: Path, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self._folder, prefix=".partial-") as partial:
            staged = Path(partial, note.name)
            staged.write_text(text)
            os.replace(staged, note)


def _read_note(note: Path) -> dict[str, object]:
    """Empty where there is none that can be read: then the hash is computed, and noted anew."""
    try:
        content = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _states(path: Path) -> dict[str, str]:
    """Of every weight file: its length, and its time of change to the nanosecond."""
    stats = {file.relative_to(path).as_posix(): file.stat() for file in weight_files(path)}
    return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in stats.items()}


def _key(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_ino, stat.st_mtime_ns


def _state(path: Path) -> str:
    stat = path.stat()
    # whole seconds: images and archives do not keep more
    return f"{stat.st_size}-{int(stat.st_mtime)}"
