"""Tiles against the whole."""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.engine.tiling import OVERLAP, TILE, decode_in_tiles, needs_tiles


def enlarge(latents: torch.Tensor) -> torch.Tensor:
    """A decoder that sees one pixel at a time."""
    return latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (72, 64), (65, 128), (128, 128), (96, 250)])
def test_the_whole_is_put_together(size: tuple[int, int]) -> None:
    latents = torch.randn(1, 4, *size)
    seen: list[tuple[int, int]] = []

    def decode(tile: torch.Tensor) -> torch.Tensor:
        seen.append((tile.shape[-2], tile.shape[-1]))
        return enlarge(tile)

    torch.testing.assert_close(decode_in_tiles(decode, latents), enlarge(latents))
    assert all(max(tile) <= TILE for tile in seen)
    assert (len(seen) > 1) == needs_tiles(*size)


def test_neighbours_fade_into_each_other() -> None:
    number = iter(range(100))

    def decode(tile: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3, 8 * tile.shape[2], 8 * tile.shape[3]), float(next(number)))

    line = decode_in_tiles(decode, torch.zeros(1, 4, 8, 2 * TILE - OVERLAP))[0, 0, 0]
    assert line[0] == 0 and line[-1] == 1
    rising = line.diff()
    assert (rising >= 0).all()
    assert rising.max() < 1.5 / (8 * OVERLAP)  # no seam
