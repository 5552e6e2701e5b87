"""What kernels share that work on many matrices in one launch: a program makes one tile, and tables
of int64 say which matrix that is part of and where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Of the matrices behind the addresses."""


def make_table(rows: Sequence[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """The rows on the device, int64: addresses are numbers too."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


def owners_of_tiles(tiles: Sequence[int], device: torch.device) -> torch.Tensor:
    """The matrix of each tile, int32, where the i-th matrix has ``tiles[i]`` of them."""
    matrices = torch.arange(len(tiles), dtype=torch.int32)
    return torch.repeat_interleave(matrices, torch.tensor(tiles)).to(device)
