"""Image files to arrays and back.

Everything here takes milliseconds to seconds of one core: call it from :class:`CodecPool`, never on
the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import numpy as np
import pybase64
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from experimance_controlnet.data_types import ImageFormat
from experimance_controlnet.engine.request import DepthImage, PixelImage
from experimance_controlnet.errors import BadDepthMapError
from experimance_controlnet.server.png import encode_png

P = ParamSpec("P")
T = TypeVar("T")

FIELD = "depth_map_b64"
DEPTH_PIXELS_MAX = 4096 * 4096
"""Four times the pixels of the largest image: more is of no use. Decoding one of this size takes
about 100 MB at the peak; a bomb is refused by its header alone."""
DEPTH_SIDE_PX_MAX = 8192
"""Four times the longest side of an image. Resizing costs memory by the side, not by the area."""
MEDIA_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
CODEC_THREADS = min(4, os.cpu_count() or 1)
"""Few, so that memory stays bounded."""
METADATA_KEY = "generation"
"""Name of the PNG text chunk."""

# DEPTH_PIXELS_MAX is stricter than Pillow's own limit, which at half its value only warns.
Image.MAX_IMAGE_PIXELS = None

_DATA_URL = re.compile(r"data:[^,]{0,100};base64,")
_LINE_BREAKS = {ord("\r"): None, ord("\n"): None}
_SIXTEEN_BIT = ("I;16", "I;16B", "I")
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
# What Pillow raises for a file that is not what it says.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    UserWarning,  # of a corrupt header, where warnings are errors
)
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


@dataclass(frozen=True, slots=True)
class DepthMap:
    """What steers an image, and what tells it from others."""

    image: DepthImage
    file_sha256: str | None
    """None where the server drew it."""


class CodecPool:
    """The threads that images are read and written on; the engine never waits for them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(CODEC_THREADS, thread_name_prefix="codec")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``work``; the event loop goes on meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Begin nothing new; what runs ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def decode_depth(text: str) -> DepthMap:
    """A depth map from base64 or a data URL; 16-bit grey keeps its range, colour turns to grey.

    Raises:
        BadDepthMapError: not base64, not a still PNG, JPEG or WebP, damaged, too large, or 16-bit
            colour.
    """
    content = _from_base64(text)
    try:
        # A call of its own: its image is gone before the floats need their memory.
        grey, full_scale = _read_grey(content)
    except UnidentifiedImageError as error:
        raise BadDepthMapError(FIELD, "It must be a PNG, JPEG or WebP image.") from error
    except _DECODE_ERRORS as error:
        raise BadDepthMapError(FIELD, "The image is damaged or incomplete.") from error
    depth = grey.astype(np.float32)
    depth /= full_scale
    return DepthMap(depth, hashlib.sha256(content).hexdigest())


def mock_depth(width: int, height: int) -> DepthMap:
    """A radial depth map: 1 (near) in the centre, 0 (far) in the corners."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    radius = np.sqrt((x * x + y * y) / 2)  # (height, width) 0..1, a rounding error above at most
    return DepthMap(cast(DepthImage, np.maximum(1 - radius, np.float32(0))), None)


def encode_image(
    pixels: PixelImage, image_format: ImageFormat, quality: int, metadata_json: str
) -> bytes:
    """A file of the format with the metadata (ASCII JSON) inside: PNG text or EXIF UserComment."""
    if image_format == "png":
        return encode_png(pixels, METADATA_KEY, metadata_json)
    exif, file = Image.Exif(), io.BytesIO()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"ASCII\0\0\0" + metadata_json.encode("ascii")
    image = Image.fromarray(pixels)
    image.save(file, image_format.upper(), quality=quality, exif=exif.tobytes())
    return file.getvalue()


def _from_base64(text: str) -> bytes:
    prefix = _DATA_URL.match(text)
    payload = text[prefix.end() :] if prefix else text
    if "\n" in payload or "\r" in payload:  # few have any, and translating a megabyte takes 1.4 ms
        payload = payload.translate(_LINE_BREAKS)
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError as error:  # binascii.Error is one
        raise BadDepthMapError(FIELD, "It must be base64 or a data URL in base64.") from error


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > DEPTH_PIXELS_MAX or max(width, height) > DEPTH_SIDE_PX_MAX:
        raise BadDepthMapError(
            FIELD,
            f"It has {width} x {height} pixels; at most {DEPTH_SIDE_PX_MAX} a side and "
            f"{DEPTH_PIXELS_MAX} in all are allowed.",
        )
    if image.mode not in _SIXTEEN_BIT + _EIGHT_BIT:
        raise BadDepthMapError(FIELD, f"It must be grey or RGB(A), not {image.mode}.")
    if getattr(image, "n_frames", 1) > 1:  # only some of Pillow's classes have it
        raise BadDepthMapError(FIELD, "It must be a still image, not an animation.")


def _is_sixteen_bit_colour(png: bytes) -> bool:
    """Pillow would cut it to 8 bits without a word; the IHDR chunk, always the first, tells."""
    bit_depth, colour_type = png[24:26]
    return bit_depth == 16 and colour_type in (2, 4, 6)


def _read_grey(content: bytes) -> tuple[NDArray[np.generic], int]:
    """(height, width) integers, and the value that stands for 1."""
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
        _check_header(image)
        if image.format == "PNG" and _is_sixteen_bit_colour(content):
            raise BadDepthMapError(
                FIELD, "It is 16-bit colour; send 16-bit grey without alpha, or 8-bit colour."
            )
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in _SIXTEEN_BIT:
            return np.asarray(image), 65535
        image.info.pop("transparency", None)  # alpha says nothing about depth
        return np.asarray(image.convert("L")), 255
