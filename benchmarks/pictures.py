"""Pictures that benchmarks work on, the same each time; (size, size, 3) RGB, but for depth."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from experimance_controlnet.engine.request import DepthImage, PixelImage

_SHEET = Path(__file__).parents[1] / "docs" / "contact_sheet.jpg"
_TILE_PX = 320


def landscape(size: int) -> PixelImage:
    """Slopes with fine grain, about as hard to compress as a photograph."""
    grain = np.random.default_rng(0).normal(scale=6, size=(size, size, 3))
    return np.clip(128 + 90 * _slopes(size) + grain, 0, 255).astype(np.uint8)


def gradient(size: int) -> PixelImage:
    """The same slopes without grain."""
    return (128 + 90 * _slopes(size)).astype(np.uint8)


def noise(size: int) -> PixelImage:
    """Every byte by chance: nothing can be saved."""
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def drawing(size: int) -> PixelImage:
    """A tile of the README's contact sheet, enlarged: what the embedded model draws."""
    with Image.open(_SHEET) as sheet:
        tile = sheet.convert("RGB").crop((_TILE_PX, 0, 2 * _TILE_PX, _TILE_PX))
    return np.array(tile.resize((size, size), Image.Resampling.LANCZOS))


@cache
def hills(size: int) -> DepthImage:
    """A smooth depth map, 0..1."""
    y, x = np.mgrid[0:size, 0:size] / size * 6
    height = np.sin(x + 1) * np.cos(y) + np.sin(2 * x + y)
    depth: DepthImage = ((height - height.min()) / np.ptp(height)).astype(np.float32)
    return depth


def _slopes(size: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.float64]]:
    """(size, size, 3) -1..1"""
    y, x = np.mgrid[0:size, 0:size] / size
    return np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - x), np.sin(11 * x * y)], axis=-1)
