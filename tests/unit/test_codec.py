from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import struct
import threading
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experimance_controlnet.data_types import ImageFormat
from experimance_controlnet.engine.request import DepthImage
from experimance_controlnet.errors import BadDepthMapError
from experimance_controlnet.server import codec

RAMP8 = np.arange(256, dtype=np.uint8).reshape(8, 32)
RAMP16 = np.arange(0, 65536, 256, dtype=np.uint16).reshape(8, 32) + 17


def saved(image: Image.Image, image_format: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return base64.b64encode(file.getvalue()).decode()


def decode(text: str) -> DepthImage:
    return codec.decode_depth(text).image


def grey(array: Any = RAMP8) -> Image.Image:
    return Image.fromarray(array)


# ---- depth maps that can be used ------------------------------------------------------------


def test_eight_bit_grey() -> None:
    depth = decode(saved(grey()))
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth, RAMP8.astype(np.float32) / 255)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    depth = decode(saved(grey(RAMP16)))
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, RAMP16 / 65535, atol=1e-7)
    assert len(np.unique(depth)) == 256


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_other_modes_become_the_same_grey(mode: str) -> None:
    image = grey().convert(mode)
    np.testing.assert_allclose(decode(saved(image)), RAMP8 / 255, atol=1 / 255)


def test_one_bit() -> None:
    depth = decode(saved(grey().convert("1", dither=Image.Dither.NONE)))
    assert set(np.unique(depth)) == {0.0, 1.0}


def test_colour_becomes_luminance() -> None:
    values = [
        decode(saved(Image.new("RGB", (2, 2), colour)))[0, 0] for colour in ("red", "lime", "blue")
    ]
    np.testing.assert_allclose(values, [0.299, 0.587, 0.114], atol=0.003)


@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_alpha_says_nothing(alpha: int) -> None:
    image = Image.new("RGBA", (2, 2), (200, 200, 200, alpha))
    assert decode(saved(image))[0, 0] == pytest.approx(200 / 255)


def test_a_palette_with_transparency() -> None:
    image = grey().convert("P")
    depth = decode(saved(image, transparency=bytes(range(256))))
    np.testing.assert_allclose(depth, RAMP8 / 255, atol=1 / 255)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_lossy_formats(image_format: str) -> None:
    depth = decode(saved(Image.new("L", (40, 20), 128), image_format, quality=100))
    assert depth.shape == (20, 40)
    np.testing.assert_allclose(depth, 128 / 255, atol=0.01)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    image = Image.new("L", (40, 20))
    image.paste(255, (0, 0, 40, 10))  # top half
    depth = decode(saved(image, image_format, exif=exif))
    assert depth.shape == (40, 20)
    assert depth[:, 12:].mean() > 0.95
    assert depth[:, :8].mean() < 0.05


def test_orientation_of_sixteen_bit() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    depth = decode(saved(grey(RAMP16), exif=exif))
    np.testing.assert_allclose(depth, RAMP16[::-1, ::-1] / 65535, atol=1e-7)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: text,
        lambda text: f"data:image/png;base64,{text}",
        lambda text: f"data:image/png;charset=x;base64,{text}",
        lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    ],
)
def test_spellings_of_base64(wrap: Any) -> None:
    np.testing.assert_array_equal(decode(wrap(saved(grey()))), RAMP8.astype(np.float32) / 255)


# ---- depth maps that cannot -----------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text + "!",
        lambda text: " " + text,
        lambda text: "=" + text,
        lambda text: text + "=",
        lambda text: text + "AAAA=" + text,
        lambda text: text[:-5],
        lambda text: text.replace("A", "é", 1),
        lambda text: text.replace("A", "\ud800", 1),
        lambda text: f"data:image/png,{text}",
        lambda text: f"data:{'x' * 200};base64,{text}",
        lambda text: f"https://example.org/{text}",
    ],
)
def test_bad_base64(spoil: Any) -> None:
    with pytest.raises(BadDepthMapError) as caught:
        decode(spoil(saved(grey())))
    assert caught.value.field == "depth_map_b64"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (saved(Image.new("CMYK", (8, 8)), "JPEG"), "not CMYK"),
        (saved(grey(), "GIF"), "PNG, JPEG or WebP"),
        (saved(grey(), "BMP"), "PNG, JPEG or WebP"),
        (saved(grey(), save_all=True, append_images=[grey(RAMP8[::-1])]), "still image"),
        (saved(grey(), "WEBP", save_all=True, append_images=[grey(RAMP8[::-1])]), "still image"),
        (base64.b64encode(b"<svg/>").decode(), "PNG, JPEG or WebP"),
        ("", "PNG, JPEG or WebP"),
        (saved(Image.effect_noise((64, 64), 50))[:400], "damaged"),
    ],
)
def test_images_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(BadDepthMapError, match=reason):
        decode(text)


def png(
    width: int, height: int, bit_depth: int = 8, colour_type: int = 0, rows: bytes = b""
) -> str:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


@pytest.mark.parametrize(
    "size",
    [(4097, 4096), (100_000, 100_000), (2**31 - 1, 2**31 - 1), (8193, 1), (1, 8193), (2**24, 1)],
)
def test_too_many_pixels_are_refused_by_the_header(size: tuple[int, int]) -> None:
    text = png(*size)
    tracemalloc.start()
    with pytest.raises(BadDepthMapError, match="pixels"):
        decode(text)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("size", [(4096, 4096), (8192, 2048), (1, 8192)])
def test_the_largest_size_is_read(size: tuple[int, int]) -> None:
    assert decode(saved(Image.new("L", size))).shape == size[::-1]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_is_not_cut_to_eight(colour_type: int, channels: int) -> None:
    for bit_depth, reason in ((16, "16-bit grey without alpha, or 8-bit colour"), (8, None)):
        row = b"\0" + b"\x12\x34"[: bit_depth // 8] * channels * 2
        text = png(2, 2, bit_depth, colour_type, row * 2)
        if reason is None:
            assert decode(text).shape == (2, 2)
        else:
            with pytest.raises(BadDepthMapError, match=reason):
                decode(text)


def test_a_file_is_known_by_its_hash() -> None:
    text = saved(grey(RAMP16))
    expected = hashlib.sha256(base64.b64decode(text)).hexdigest()
    for spelling in (text, f"data:image/png;base64,{text}"):
        assert codec.decode_depth(spelling).file_sha256 == expected
    assert codec.mock_depth(64, 64).file_sha256 is None


def test_damage_of_any_kind_is_a_bad_depth_map() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x"
    noise = Image.effect_noise((64, 48), 50)
    originals = [
        base64.b64decode(text)
        for text in (
            saved(grey()),
            saved(grey(RAMP16), exif=exif),
            saved(noise.convert("P"), transparency=b"\1\2"),
            saved(noise, "JPEG", exif=exif),
            saved(noise, "WEBP", exif=exif),
            saved(noise.convert("RGBA"), "WEBP", lossless=True),
        )
    ]
    dice = random.Random(1)
    refused = 0
    for _ in range(1500):
        content = bytearray(dice.choice(originals))
        for _ in range(dice.randint(1, 6)):
            content[dice.randrange(min(len(content), 400))] = dice.randrange(256)
        del content[len(content) - dice.choice((0, 0, dice.randrange(len(content)))) :]
        try:
            depth = decode(base64.b64encode(content).decode())
        except BadDepthMapError:
            refused += 1
        else:
            assert depth.min() >= 0
            assert depth.max() <= 1
    assert refused > 500


# ---- the mock -------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 256), (2048, 1024)])
def test_the_mock_is_near_in_the_centre(width: int, height: int) -> None:
    depth = codec.mock_depth(width, height).image
    assert depth.shape == (height, width)
    assert depth.dtype == np.float32
    assert depth[height // 2, width // 2] == depth.max() > 0.99
    assert depth[0, 0] == depth[-1, -1] == depth.min() == pytest.approx(0, abs=1e-6)
    assert depth.min() >= 0
    np.testing.assert_allclose(depth, depth[::-1, ::-1], atol=1e-6)
    row = depth[height // 2]
    assert np.all(np.diff(row[: width // 2]) > 0)


# ---- image files ----------------------------------------------------------------------------

PIXELS = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
METADATA = json.dumps({"prompt": "fjäll 🏔 " * 250, "seed": 1})


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_files_hold_pixels_and_metadata(image_format: ImageFormat) -> None:
    file = codec.encode_image(PIXELS, image_format, 95, METADATA)
    image = Image.open(io.BytesIO(file))
    assert image.format == image_format.upper()
    assert Image.MIME[image.format] == codec.MEDIA_TYPES[image_format]
    pixels = np.asarray(image)
    assert pixels.shape == PIXELS.shape
    if image_format == "png":
        np.testing.assert_array_equal(pixels, PIXELS)
        assert json.loads(image.info["generation"]) == json.loads(METADATA)
    else:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"ASCII\0\0\0" + METADATA.encode("ascii")


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_quality(image_format: ImageFormat) -> None:
    sizes = [len(codec.encode_image(PIXELS, image_format, q, "{}")) for q in (1, 50, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] * 2 < sizes[2]


def test_the_longest_prompts_fit_into_exif() -> None:
    longest = json.dumps({"prompt": "🏔" * 2000, "negative_prompt": "🏔" * 2000})
    file = codec.encode_image(PIXELS, "jpeg", 90, longest)
    comment = Image.open(io.BytesIO(file)).getexif().get_ifd(0x8769)[0x9286]
    assert comment.endswith(longest[-20:].encode())


def test_the_pool_keeps_the_loop_free() -> None:
    release = threading.Event()

    async def use() -> str:
        pool = codec.CodecPool()
        blocked = asyncio.ensure_future(pool.run(release.wait, timeout=20))
        await asyncio.sleep(0.05)
        assert not blocked.done()
        release.set()
        await blocked
        name = await pool.run(lambda: threading.current_thread().name)
        pool.close()
        return name

    assert asyncio.run(use()).startswith("codec")
