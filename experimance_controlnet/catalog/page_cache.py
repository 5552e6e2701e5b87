"""Weights into the page cache, before they are wanted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from experimance_controlnet.catalog.hashes import weight_files

_CHUNK_BYTES = 32 << 20
"""As large as a hash's, for the same reason."""
_STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers call the weights of a component."""


def read_ahead(paths: Iterable[Path], limit_bytes: int) -> int:
    """Read the weights of these files and folders, in order, and forget them: whoever reads them
    next finds them in memory.

    Of a folder, what the engine will take. Stops before the file that exceeds the limit: more than
    memory holds would push out what was read first. Returns the bytes that were read.

    Raises:
        OSError: a file cannot be read.
    """
    read_bytes = 0
    chunk = bytearray(_CHUNK_BYTES)
    for file in dict.fromkeys(file for path in paths for file in _wanted(path)):
        if read_bytes + file.stat().st_size > limit_bytes:
            break
        with file.open("rb", buffering=0) as opened:
            while size := opened.readinto(chunk):
                read_bytes += size
    return read_bytes


def _wanted(path: Path) -> list[Path]:
    """Repositories hold the weights once more in one file, and in other precisions."""
    if path.is_file():
        return [path]
    files = [file for file in weight_files(path) if file.name.startswith(_STEMS)]
    in_fp16 = {file.with_suffix(".fp16.safetensors") for file in files}
    return [file for file in files if file not in in_fp16]
