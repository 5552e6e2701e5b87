"""Room, faults and flushing of the disk that holds MODELS_DIR."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experimance_controlnet.errors import DiskFullError, ModelFileError

_SPARE_BYTES = 256 << 20  # stays free, for logs and whatever else lives on that disk


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises DiskFullError where a folder's disk cannot take that much and keep a reserve."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise DiskFullError(
            f"the disk of MODELS_DIR has {free_bytes / 1e9:.1f} GB free; "
            f"a download needs {(needed_bytes + _SPARE_BYTES) / 1e9:.1f} GB: remove what is not "
            "needed, or set MODELS_DIR to a larger disk"
        )


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn an OSError of writing ``target`` into DiskFullError or ModelFileError."""
    try:
        yield
    except OSError as error:
        message = f"cannot write {target}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{message}: remove what is not needed") from error
        raise ModelFileError(message) from error


def remove_whole(path: Path) -> int:
    """Remove a file or folder, if it exists; returns the bytes of disk that this frees.

    A folder loses its name first, at once and with all that is in it: nobody finds a half of it.
    A link is removed, not what it leads to. Raises OSError.
    """
    doomed = path.with_name(f".removed-{path.name}")
    if doomed.is_dir() and not doomed.is_symlink():  # of a process that was killed in here
        shutil.rmtree(doomed)
    if path.is_dir() and not path.is_symlink():
        freed_bytes = sum(map(_held_bytes, path.rglob("*")))
        os.replace(path, doomed)
        shutil.rmtree(doomed)
        return freed_bytes
    try:
        freed_bytes = _held_bytes(path)
        path.unlink()
    except FileNotFoundError:
        return 0
    return freed_bytes


def _held_bytes(path: Path) -> int:
    return path.lstat().st_blocks * 512


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
