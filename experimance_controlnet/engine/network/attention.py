"""Which implementation of attention torch shall take."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_BY_SPEED = [
    # On an H200 1.6 times as fast as the next for the UNet's 4096 tokens.
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest_attention(device: torch.device) -> AbstractContextManager[None]:
    """Within it, ``scaled_dot_product_attention`` takes the fastest kernel that fits its inputs.

    torch's own order of preference changes from release to release.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(_BY_SPEED, set_priority=True)
