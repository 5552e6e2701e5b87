"""A large picture decoded in overlapping tiles: a fraction of the memory, about twice the work.

Each tile is normalised by its own statistics, so the picture is not quite that of a whole decode;
where tiles overlap they fade into each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

TILE = 64
"""Side of a tile, latent pixels: 512 pixels of the picture."""
OVERLAP = 16
"""Of two neighbours at least, latent pixels."""
_SCALE = 8
"""Pixels of the picture to one of the latents, on each side."""


def needs_tiles(height: int, width: int) -> bool:
    """Whether latents of this size are larger than a tile."""
    return max(height, width) > TILE


def decode_in_tiles(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor
) -> torch.Tensor:
    """``decode`` makes (1, 3, 8 h, 8 w) of latents (1, C, h, w), of one tile at a time. Returns the
    same for all of ``latents``, in fp32.
    """
    height, width = latents.shape[-2:]
    picture = latents.new_zeros((1, 3, _SCALE * height, _SCALE * width), dtype=torch.float32)
    weights = torch.zeros_like(picture[:, :1])
    for rows in _spans(height):
        for columns in _spans(width):
            tile = decode(latents[..., rows, columns]).float()
            fade = _fade(tile.shape[-2], latents)[:, None] * _fade(tile.shape[-1], latents)
            place = (..., _scaled(rows), _scaled(columns))
            picture[place] += fade * tile
            weights[place] += fade
    return picture / weights


def _spans(length: int) -> list[slice]:
    """Tiles along one side, evenly spread; each overlaps the next by :data:`OVERLAP` or more."""
    if length <= TILE:
        return [slice(0, length)]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    firsts = [round(index * (length - TILE) / (count - 1)) for index in range(count)]
    return [slice(first, first + TILE) for first in firsts]


def _scaled(span: slice) -> slice:
    return slice(_SCALE * span.start, _SCALE * span.stop)


def _fade(pixels: int, like: torch.Tensor) -> torch.Tensor:
    """How much a tile counts along one side: rising over the overlap, level, falling. Nowhere 0."""
    near = torch.arange(1, pixels + 1, device=like.device, dtype=torch.float32)
    return torch.minimum(near, near.flip(0)).clamp(max=_SCALE * OVERLAP)
