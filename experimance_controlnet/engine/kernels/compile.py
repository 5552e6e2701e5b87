"""Compiles all kernels that SDXL needs on this GPU into Triton's cache; a program of its own.

``engine/precompile.py`` runs it beside the start of the server.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from experimance_controlnet.engine import kernels
from experimance_controlnet.engine.kernels import merge, quantise

_UNET_CHANNELS = (320, 640, 960, 1280, 1920, 2560)
_VAE_CHANNELS = (128, 256, 512)
_SIDE_PX = 16
_THREADS = 4
"""LLVM and the assembler work without Python; more threads than this wait for it."""


def main(precision: str) -> None:
    """Nothing to do without CUDA and Triton. ``precision``: ``fp8`` needs more than the others."""
    if not torch.cuda.is_available() or not kernels.are_fused():
        return
    work = [_for_transformers, _for_joints, _for_adapters]
    if precision == "fp8" and quantise.is_supported(torch.device("cuda")):
        work.append(_for_fp8)
    work += [partial(_for_unet_norms, channels) for channels in _UNET_CHANNELS]
    work += [partial(_for_vae, channels) for channels in _VAE_CHANNELS]
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(piece) for piece in work]:
            done.result()


@torch.inference_mode()
def _for_transformers() -> None:
    tokens = torch.zeros((16, 640), dtype=torch.float16, device="cuda")
    for channels in (640, 1280):
        row, x = tokens.new_zeros(channels), tokens.new_zeros((16, channels))
        kernels.layer_norm(x, row, row, 1e-5)
        kernels.add_layer_norm(x, x, row, row, 1e-5)
    kernels.geglu(tokens)


@torch.inference_mode()
def _for_joints() -> None:
    image = torch.zeros((2, 640, _SIDE_PX, _SIDE_PX), dtype=torch.float16, device="cuda")
    kernels.join(image, image, image, torch.zeros(2, device="cuda"))
    kernels.join(image, image)
    kernels.add_bias(image, image[0, :, 0, 0].contiguous(), image)


@torch.inference_mode()
def _for_adapters() -> None:
    weight = torch.zeros((64, 64), dtype=torch.float16, device="cuda")
    for rank in (merge.RANK_MULTIPLE, 2 * merge.RANK_MULTIPLE):
        down = weight.new_zeros((rank, 64))
        update = merge.Update(down.T.contiguous(), down, scale=1.0, slot=0)
        merge.make_plan([merge.Target(weight, weight.clone(), [update])]).run([1.0])


@torch.inference_mode()
def _for_fp8() -> None:
    for channels in (640, 1280):
        x = torch.zeros((16, channels), dtype=torch.float16, device="cuda")
        row = x[0]
        kernels.layer_norm_quantised(x, row, row, 1e-5)
        kernels.add_layer_norm_quantised(x, x, row, row, 1e-5)
        kernels.add_layer_norm_quantised(x, x, row, row, 1e-5, row)
        wide = x.new_zeros((16, 8 * channels))
        kernels.geglu_quantised(wide, wide[0])
    quantised = quantise.empty_quantised(x.shape, x.device)
    quantise.make_plan([quantise.WeightCopy(x, quantised)]).run()


@torch.inference_mode()
def _for_unet_norms(channels: int) -> None:
    size = (2, _SIDE_PX, _SIDE_PX, channels)
    _group_norms(torch.zeros(size, dtype=torch.float16, device="cuda"), per_image=True)


@torch.inference_mode()
def _for_vae(channels: int) -> None:
    size = (1, _SIDE_PX, _SIDE_PX, channels)
    image = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    _group_norms(image, per_image=False)
    image = image.permute(0, 3, 1, 2)
    kernels.add_bias(image, image[0, :, 0, 0].contiguous(), image)
    if channels == max(_VAE_CHANNELS):
        kernels.interleave(image, image.new_zeros(channels // 4))


def _group_norms(pixels: torch.Tensor, per_image: bool) -> None:
    """All that residual blocks and transformers ask for; ``pixels`` (B, H, W, C)."""
    x, channels = pixels.permute(0, 3, 1, 2), pixels.shape[-1]
    row = pixels.new_zeros(channels)
    shift = pixels.new_zeros((len(pixels), channels)) if per_image else row
    kernels.group_norm(x, row, row, 32, 1e-5, silu=True)
    kernels.group_norm(x, row, row, 32, 1e-5, silu=True, shift=shift)
    kernels.group_norm(x, row, row, 32, 1e-5)


if __name__ == "__main__":
    main(precision=sys.argv[1])
