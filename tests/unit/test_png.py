from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from experimance_controlnet.server.png import SIGNATURE, encode_png

NOISE = np.random.default_rng(2).integers(0, 256, (61, 47, 3), dtype=np.uint8)


def chunks(file: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and data of each; the lengths and the checksums have to be right."""
    assert file.startswith(SIGNATURE)
    rest, found = file[len(SIGNATURE) :], []
    while rest:
        (length,) = struct.unpack(">I", rest[:4])
        kind, data, checksum = rest[4:8], rest[8 : 8 + length], rest[8 + length : 12 + length]
        assert checksum == struct.pack(">I", zlib.crc32(kind + data))
        found.append((kind, data))
        rest = rest[12 + length :]
    return found


def opened(file: bytes) -> PngImagePlugin.PngImageFile:
    image = Image.open(io.BytesIO(file))
    assert isinstance(image, PngImagePlugin.PngImageFile)
    return image


@given(
    arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 70), st.just(3)), fill=st.just(7)
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
)
def test_pillow_reads_the_same_pixels_and_text(pixels: NDArray[np.uint8], text: str) -> None:
    image = opened(encode_png(pixels, "generation", text))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)
    assert image.text == {"generation": text}


@pytest.mark.parametrize(
    "pixels",
    [
        NOISE[:1, :1],
        NOISE[:1],
        NOISE[:, :1],
        NOISE[::-1, ::2],  # not contiguous
        NOISE[..., ::-1],
        np.moveaxis(np.moveaxis(NOISE, 2, 0).copy(), 0, 2),  # as a decoder leaves its channels
        np.zeros((64, 64, 3), np.uint8),
        np.tile(np.array([[[0, 255, 0]], [[255, 0, 255]]], np.uint8), (9, 13, 1)),
    ],
)
def test_shapes_and_layouts(pixels: NDArray[np.uint8]) -> None:
    before = pixels.copy()
    np.testing.assert_array_equal(opened(encode_png(pixels, "k", "")), pixels)
    np.testing.assert_array_equal(pixels, before)


def test_chunks_follow_the_specification() -> None:
    file = encode_png(NOISE, "generation", "fjäll")
    kinds, data = zip(*chunks(file), strict=True)
    assert kinds == (b"IHDR", b"iTXt", b"IDAT", b"IEND")
    assert data[0] == bytes([0, 0, 0, 47, 0, 0, 0, 61, 8, 2, 0, 0, 0])
    assert data[1] == b"generation\0\0\0\0\0" + "fjäll".encode()
    rows = np.frombuffer(zlib.decompress(data[2]), np.uint8).reshape(61, 1 + 3 * 47)
    assert set(rows[:, 0]) == {2}  # Up
    np.testing.assert_array_equal(
        np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8), NOISE.reshape(61, -1)
    )
    assert data[3] == b""
