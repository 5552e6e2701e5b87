"""Compile the kernels before anybody waits for them.

Triton compiles a kernel when it is first called, a second or so for each: ten seconds for SDXL on
an empty cache. Most of that is not Python's, so it goes on beside imports and the reading of files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
import torch

from experimance_controlnet.engine import kernels

log = structlog.get_logger()

_UNET_CHANNELS = (320, 640, 960, 1280, 1920, 2560)
_VAE_CHANNELS = (128, 256, 512)
_SIDE_PX = 16


def compile_in_background() -> None:
    """Begin to compile what SDXL needs, on daemon threads; nothing to do without CUDA
    and Triton.

    Who calls a kernel meanwhile compiles it by himself: the first to be done is kept.
    """
    if not torch.cuda.is_available() or not kernels.are_fused():
        return
    for work in (_compile_for_unet, _compile_for_vae):
        threading.Thread(target=_report, args=(work,), name="compiler", daemon=True).start()


def _report(work: Callable[[], None]) -> None:
    started_s = time.monotonic()
    with torch.inference_mode():
        work()
    log.info("kernels_compiled", part=work.__name__, seconds=round(time.monotonic() - started_s, 3))


def _compile_for_unet() -> None:
    tokens = torch.zeros((16, 640), dtype=torch.float16, device="cuda")
    for channels in (640, 1280):
        row, x = tokens.new_zeros(channels), tokens.new_zeros((16, channels))
        kernels.layer_norm(x, row, row, 1e-5)
        kernels.add_layer_norm(x, x, row, row, 1e-5)
    kernels.geglu(tokens)
    for channels in _UNET_CHANNELS:
        _group_norms(tokens.new_zeros((2, _SIDE_PX, _SIDE_PX, channels)), per_image=True)
    image = tokens.new_zeros((2, 640, _SIDE_PX, _SIDE_PX))
    strength = torch.zeros(2, device="cuda")
    kernels.join(image, image, image, strength)
    kernels.join(image, image)
    kernels.add_bias(image, tokens[0], image)


def _compile_for_vae() -> None:
    for channels in _VAE_CHANNELS:
        size = (1, _SIDE_PX, _SIDE_PX, channels)
        image = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
        _group_norms(image, per_image=False)
        image = image.permute(0, 3, 1, 2)
        kernels.add_bias(image, image[0, :, 0, 0].contiguous(), image)
    kernels.interleave(image, image.new_zeros(channels // 4))


def _group_norms(pixels: torch.Tensor, per_image: bool) -> None:
    """All that residual blocks and transformers ask for; ``pixels`` (B, H, W, C)."""
    x, channels = pixels.permute(0, 3, 1, 2), pixels.shape[-1]
    row = pixels.new_zeros(channels)
    shift = pixels.new_zeros((len(pixels), channels)) if per_image else row
    kernels.group_norm(x, row, row, 32, 1e-5, silu=True)
    kernels.group_norm(x, row, row, 32, 1e-5, silu=True, shift=shift)
    kernels.group_norm(x, row, row, 32, 1e-5)
