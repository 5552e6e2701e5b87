"""GroupNorm for channels_last: three launches.

One read for sums per channel, a tiny launch that turns them into a scale and an offset per channel,
one read and one write to apply those. All sums are taken in a fixed order, so results are the same
bits every time. A single launch, a program for each group, is slower even on small images: it
occupies too little of the device.

Variance is E[x^2] - E[x]^2 in fp32: activations whose mean is a few deviations lose nothing that
fp16 could show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHANNELS = 64
"""A tile's width: divides every channel count of SDXL; 128 bytes a row in half precision."""
_SPLITS = 256
"""Parts into which an image is split for the sums, at most; a constant, so that one kernel is
compiled for all sizes."""
_PROGRAMS = 2048
"""About how many programs should sum: several waves of any GPU."""

_ANY = ["pixels", "shift_stride"]
"""Arguments whose value is no reason to compile anew; only ``channels`` decides how wide a load may
be."""


@triton.jit(do_not_specialize=[*_ANY, "split_pixels"])
def _sums_kernel(
    x_ptr, shift_ptr, partial_ptr, pixels, channels, split_pixels, shift_stride,
    HAS_SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    shift = tl.zeros((COLUMNS,), tl.float32)
    if HAS_SHIFT:
        shift += tl.load(shift_ptr + image * shift_stride + channel, inside, 0.0).to(tl.float32)
    start = image.to(tl.int64) * pixels * channels
    end = tl.minimum((split + 1) * split_pixels, pixels)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(split * split_pixels, end, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        at = start + row[:, None].to(tl.int64) * channels + channel[None, :]
        value = tl.load(x_ptr + at, mask, 0.0).to(tl.float32) + shift[None, :]
        value = tl.where(mask, value, 0.0)
        sums += value
        squares += value * value
    at = ((image * tl.num_programs(0) + split) * 2) * channels + channel
    tl.store(partial_ptr + at, tl.sum(sums, axis=0), inside)
    tl.store(partial_ptr + at + channels, tl.sum(squares, axis=0), inside)


@triton.jit(do_not_specialize=[*_ANY, "splits"])
def _scales_kernel(
    partial_ptr, shift_ptr, weight_ptr, bias_ptr, scales_ptr,
    pixels, channels, group_channels, splits, shift_stride, eps,
    HAS_SHIFT: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, image = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    inside = column < group_channels
    channel = group * group_channels + column
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & inside[None, :]
    at = ((image * splits + split[:, None]) * 2) * channels + channel[None, :]
    count = pixels * group_channels
    mean = tl.sum(tl.load(partial_ptr + at, mask, 0.0)) / count
    square = tl.sum(tl.load(partial_ptr + at + channels, mask, 0.0)) / count
    variance = tl.maximum(square - mean * mean, 0.0)
    scale = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32) - mean * scale
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + image * shift_stride + channel, inside, 0.0)
        offset += shift.to(tl.float32) * scale
    at = image * 2 * channels + channel
    tl.store(scales_ptr + at, scale, inside)
    tl.store(scales_ptr + at + channels, offset, inside)


@triton.jit(do_not_specialize=["pixels"])
def _apply_kernel(
    x_ptr, scales_ptr, out_ptr, pixels, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    row = tile * ROWS + tl.arange(0, ROWS)
    mask = (row < pixels)[:, None] & inside[None, :]
    scale = tl.load(scales_ptr + image * 2 * channels + channel, inside, 0.0)
    offset = tl.load(scales_ptr + (image * 2 + 1) * channels + channel, inside, 0.0)
    start = image.to(tl.int64) * pixels * channels
    at = start + row[:, None].to(tl.int64) * channels + channel[None, :]
    value = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    value = value * scale[None, :] + offset[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out_ptr + at, value, mask)


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = False,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    pixels, blocks = height * width, triton.cdiv(channels, _CHANNELS)
    out = torch.empty_like(x)
    splits = max(1, min(_PROGRAMS // (blocks * images), _SPLITS, triton.cdiv(pixels, 64)))
    partial = x.new_empty((images, splits, 2, channels), dtype=torch.float32)
    scales = x.new_empty((images, 2, channels), dtype=torch.float32)
    _sums_kernel[(splits, blocks, images)](
        x, shift, partial, pixels, channels, triton.cdiv(pixels, splits), _stride(shift),
        HAS_SHIFT=shift is not None, ROWS=64, COLUMNS=_CHANNELS, num_warps=4,
    )  # fmt: skip
    _scales_kernel[(groups, images)](
        partial, shift, weight, bias, scales,
        pixels, channels, channels // groups, splits, _stride(shift), eps,
        HAS_SHIFT=shift is not None, SPLITS=_SPLITS,
        COLUMNS=triton.next_power_of_2(channels // groups), num_warps=4,
    )  # fmt: skip
    _apply_kernel[(triton.cdiv(pixels, 64), blocks, images)](
        x, scales, out, pixels, channels,
        SILU=silu, ROWS=64, COLUMNS=_CHANNELS, num_warps=4,
    )  # fmt: skip
    return out


def _stride(shift: torch.Tensor | None) -> int:
    """From one image's shift to the next; 0 where all share one."""
    return 0 if shift is None or shift.ndim == 1 else shift.stride(0)
