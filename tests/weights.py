"""Small valid weight files."""

from __future__ import annotations

import hashlib
import json
import struct


def safetensors(values: int = 64, fill: bytes = b"\1") -> bytes:
    """A file with one uint8 tensor; ``fill`` is one value, or all of them."""
    header = {"w": {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}
    encoded = json.dumps(header).encode()
    content = fill if len(fill) == values else fill * values
    return struct.pack("<Q", len(encoded)) + encoded + content


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
