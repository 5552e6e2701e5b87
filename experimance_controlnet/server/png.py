"""Writes PNG files fast: 8-bit RGB and one text chunk.

After the PNG specification, third edition (W3C): section 5 (signature and chunks), section 9
(filter type Up), section 10 (the zlib stream), section 11 (IHDR, iTXt, IDAT, IEND).

Libraries that write whole PNGs spend their time in deflate; ISA-L's is ten times faster. Every row
is filtered by Up, the difference from the row above. Choosing the best of Sub, Up and Average for
each row took twice the time to save 5 % of the size of photographs, and made drawings larger.
``benchmarks/png.py`` compares with other encoders.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from isal import isal_zlib

from experimance_controlnet.engine.request import PixelImage

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH, _RGB, _NOT_INTERLACED = 8, 2, 0
_DEFLATE, _ADAPTIVE_FILTERS = 0, 0  # the only methods that the specification knows
_FILTER_UP = 2
_LEVEL = 1
"""Of ISA-L's 0..3. Level 0 is no faster here and makes larger files, level 3 is slower and makes
hardly smaller ones."""


def encode_png(pixels: PixelImage, keyword: str, text: str) -> bytes:
    """A PNG of the pixels, with ``text`` in an uncompressed iTXt chunk.

    ``keyword`` is 1 to 79 printable characters of Latin-1. Nearly all of the time is spent without
    the GIL.
    """
    height, width, _ = pixels.shape
    header = struct.pack(
        ">IIBBBBB",
        *(width, height, _BIT_DEPTH, _RGB, _DEFLATE, _ADAPTIVE_FILTERS, _NOT_INTERLACED),
    )
    # no compression (flag, method), no language, no translated keyword
    note = keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
    return b"".join(
        (
            SIGNATURE,
            *_chunk(b"IHDR", header),
            *_chunk(b"iTXt", note),
            *_chunk(b"IDAT", isal_zlib.compress(_filtered(pixels), _LEVEL)),
            *_chunk(b"IEND", b""),
        )
    )


def _filtered(pixels: PixelImage) -> PixelImage:
    """(height, 1 + 3 x width): each row's filter type, then its bytes less those above, mod 256."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]  # above the first row is zero
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _chunk(kind: bytes, data: bytes) -> tuple[bytes, ...]:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)
