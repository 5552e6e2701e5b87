"""Element by element: GEGLU, bias with residual, and moving pixels to where they belong."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from experimance_controlnet.engine.kernels.fused.quantise import scale_of
from experimance_controlnet.engine.kernels.quantise import Quantised, empty_quantised

_BLOCK = 1024


@triton.jit
def _gelu(x):
    """``x * Phi(x)`` with erf by Abramowitz & Stegun 7.1.26, to 1.5e-7; half the instructions."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    tail = 0.5 * series * tl.exp(-z * z)  # 1 - Phi(|x|)
    return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def _geglu_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * 2 * columns + column
    value = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + columns, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, value * _gelu(gate), inside)


@triton.jit
def _biased_geglu(x_ptr, bias_ptr, at, column, columns, inside):
    value = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + columns, inside, 0.0).to(tl.float32)
    value += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
    gate += tl.load(bias_ptr + columns + column, inside, 0.0).to(tl.float32)
    return value * _gelu(gate)


@triton.jit
def _geglu_quantised_kernel(
    x_ptr, bias_ptr, out_ptr, scales_ptr, columns, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    # A row in registers, as two powers of two: SDXL's 2560 and 5120 columns are 2048 + 512 and
    # 4096 + 1024, and in the next power of two a third of the arithmetic would be for nothing.
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    whole, inside = head < columns, tail < columns
    start = row * 2 * columns
    first = _biased_geglu(x_ptr, bias_ptr, start + head, head, columns, whole)
    rest = _biased_geglu(x_ptr, bias_ptr, start + tail, tail, columns, inside)
    scale = scale_of(tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(rest))))
    tl.store(scales_ptr + row, scale)
    out_ptr += row * columns
    tl.store(out_ptr + head, (first / scale).to(tl.float8e4nv), whole)
    tl.store(out_ptr + tail, (rest / scale).to(tl.float8e4nv), inside)


@triton.jit
def _add_bias_kernel(x_ptr, bias_ptr, residual_ptr, out_ptr, count, channels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    total += tl.load(bias_ptr + at % channels, inside, 0.0).to(tl.float32)
    total += tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + at, total, inside)


@triton.jit
def _join_kernel(
    x_ptr, skip_ptr, control_ptr, strength_ptr, out_ptr, pixels, x_channels, skip_channels,
    HAS_CONTROL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Tiles do not straddle the seam: the first blocks copy x, the others skip.
    tile, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x_blocks = tl.cdiv(x_channels, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at_pixel = image * pixels + row[:, None]
    channels = x_channels + skip_channels
    if block < x_blocks:
        channel = block * COLUMNS + column
        mask = (row < pixels)[:, None] & (channel < x_channels)[None, :]
        value = tl.load(x_ptr + at_pixel * x_channels + channel[None, :], mask, 0.0).to(tl.float32)
        tl.store(out_ptr + at_pixel * channels + channel[None, :], value, mask)
    else:
        channel = (block - x_blocks) * COLUMNS + column
        mask = (row < pixels)[:, None] & (channel < skip_channels)[None, :]
        at = at_pixel * skip_channels + channel[None, :]
        value = tl.load(skip_ptr + at, mask, 0.0).to(tl.float32)
        if HAS_CONTROL:
            strength = tl.load(strength_ptr + image)
            value += tl.load(control_ptr + at, mask, 0.0).to(tl.float32) * strength
        tl.store(out_ptr + at_pixel * channels + x_channels + channel[None, :], value, mask)


@triton.jit
def _interleave_kernel(
    x_ptr, bias_ptr, out_ptr, height, width, channels, COLUMNS: tl.constexpr, PIXELS: tl.constexpr
):
    # A program makes some pixels of one output line, some channels of each.
    line, block = tl.program_id(0), tl.program_id(1)
    image = line // (2 * height)
    y = line % (2 * height)
    channel = tl.arange(0, COLUMNS)[None, :]
    blocks_across = tl.cdiv(channels, COLUMNS)
    channel += (block % blocks_across) * COLUMNS
    x = (block // blocks_across) * PIXELS + tl.arange(0, PIXELS)[:, None]
    mask = (x < 2 * width) & (channel < channels)
    down, right = y % 2, x % 2
    source = (image * (height + 1) + y // 2 + down).to(tl.int64) * (width + 1) + x // 2 + right
    at = source * 4 * channels + (2 * down + right) * channels + channel
    value = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    value += tl.load(bias_ptr + channel, channel < channels, 0.0).to(tl.float32)
    at = (line.to(tl.int64) * 2 * width + x) * channels + channel
    tl.store(out_ptr + at, value, mask)


def geglu(x: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, columns))
    _geglu_kernel[(rows, triton.cdiv(columns, _BLOCK))](x, out, columns, BLOCK=_BLOCK, num_warps=4)
    return out


def geglu_quantised(x: torch.Tensor, bias: torch.Tensor) -> Quantised:
    rows, columns = x.shape[0], x.shape[1] // 2
    out = empty_quantised((rows, columns), x.device)
    head = triton.next_power_of_2(columns + 1) // 2
    _geglu_quantised_kernel[(rows,)](
        x, bias, out.values, out.scales, columns,
        HEAD=head, TAIL=triton.next_power_of_2(max(1, columns - head)),
        num_warps=8 if head >= 4096 else 4,
    )  # fmt: skip
    return out


def add_bias(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    _add_bias_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
        x, bias, residual, out, x.numel(), x.shape[1], BLOCK=_BLOCK, num_warps=4
    )
    return out


def join(
    x: torch.Tensor,
    skip: torch.Tensor,
    control: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    skip = skip.contiguous(memory_format=torch.channels_last)
    if control is not None:
        control = control.contiguous(memory_format=torch.channels_last)
    images, x_channels, height, width = x.shape
    skip_channels, pixels, columns, rows = skip.shape[1], height * width, 64, 32
    out = torch.empty(
        (images, x_channels + skip_channels, height, width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    blocks = triton.cdiv(x_channels, columns) + triton.cdiv(skip_channels, columns)
    _join_kernel[(triton.cdiv(pixels, rows), blocks, images)](
        x, skip, control, strength, out, pixels, x_channels, skip_channels,
        HAS_CONTROL=control is not None, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


def interleave(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    images, height, width = x.shape[0], x.shape[2] - 1, x.shape[3] - 1
    channels, columns, pixels = x.shape[1] // 4, 64, 32
    out = torch.empty(
        (images, channels, 2 * height, 2 * width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    blocks = triton.cdiv(channels, columns) * triton.cdiv(2 * width, pixels)
    _interleave_kernel[(images * 2 * height, blocks)](
        x, bias, out, height, width, channels, COLUMNS=columns, PIXELS=pixels, num_warps=4
    )
    return out
