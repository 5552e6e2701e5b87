"""How long a PNG takes to write and how large it is, ours beside its peers. Runs anywhere.

    python -m benchmarks.png [--size 1024] [--repeats 15] [--out FILE]

The encoders take turns, so that a clock that drifts drifts for all; times are medians on one
thread. OpenCV is measured where it is installed; the server does not need it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, PngImagePlugin

from benchmarks import pictures
from benchmarks.environment import SERVER_PACKAGES
from benchmarks.record import publish, table_of
from experimance_controlnet.engine.request import PixelImage
from experimance_controlnet.server.png import encode_png

Encode = Callable[[PixelImage], bytes]

METADATA = '{"prompt": "a valley"}' * 60
"""About as long as a request's."""
PICTURES = {
    "landscape": pictures.landscape,
    "drawing": pictures.drawing,
    "gradient": pictures.gradient,
    "noise": pictures.noise,
}
BASELINE = "pillow, level 1"


@dataclass(frozen=True, slots=True)
class Row:
    """One encoder on one picture."""

    picture: str
    encoder: str
    ms: float
    """Median."""
    size_bytes: int
    times_as_fast: float
    """As the baseline."""
    size_ratio: float
    """To the baseline's."""


def pillow(level: int | None) -> Encode:
    """None: the level that Pillow chooses."""
    options = {} if level is None else {"compress_level": level}

    def encode(pixels: PixelImage) -> bytes:
        text, file = PngImagePlugin.PngInfo(), io.BytesIO()
        text.add_itxt("generation", METADATA)
        Image.fromarray(pixels).save(file, "PNG", pnginfo=text, **options)
        return file.getvalue()

    return encode


def opencv(cv2: ModuleType) -> Encode:
    """At level 1; it writes no text chunks."""
    level = [cv2.IMWRITE_PNG_COMPRESSION, 1]

    def encode(pixels: PixelImage) -> bytes:
        _, file = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), level)
        return bytes(file)

    return encode


def encoders() -> dict[str, Encode]:
    """By name; the baseline among them."""
    found: dict[str, Encode] = {
        "ours": lambda pixels: encode_png(pixels, "generation", METADATA),
        BASELINE: pillow(1),
        "pillow, default": pillow(None),
    }
    if importlib.util.find_spec("cv2") is not None:
        cv2 = importlib.import_module("cv2")
        found[f"opencv {cv2.__version__}, level 1"] = opencv(cv2)
    return found


def measure(picture: str, pixels: PixelImage, repeats: int) -> list[Row]:
    """Every encoder on this picture. An encoder that changes a pixel is an AssertionError."""
    found = encoders()
    sizes: dict[str, int] = {}
    for name, encode in found.items():  # also warms up
        file = encode(pixels)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels), name
        sizes[name] = len(file)
    times_ms: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, encode in found.items():
            started_s = time.perf_counter()
            encode(pixels)
            times_ms[name].append(1000 * (time.perf_counter() - started_s))
    medians_ms = {name: statistics.median(times) for name, times in times_ms.items()}
    return [
        Row(
            picture=picture,
            encoder=name,
            ms=round(medians_ms[name], 2),
            size_bytes=sizes[name],
            times_as_fast=round(medians_ms[BASELINE] / medians_ms[name], 2),
            size_ratio=round(sizes[name] / sizes[BASELINE], 3),
        )
        for name in found
    ]


def main() -> None:
    """All encoders on all pictures."""
    parser = argparse.ArgumentParser(description="Measure PNG encoders.")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side (default 1024)")
    parser.add_argument("--repeats", type=int, default=15, help="(default 15)")
    parser.add_argument("--out", type=Path, help="also write the JSON into this file")
    options = parser.parse_args()
    rows = [
        row
        for name, draw in PICTURES.items()
        for row in measure(name, draw(options.size), options.repeats)
    ]
    facts = {"size_px": options.size, "repeats": options.repeats}
    table = table_of(f"PNG files of {options.size}x{options.size}", rows)
    publish("png", table, rows, facts, SERVER_PACKAGES, options.out)


if __name__ == "__main__":
    main()
