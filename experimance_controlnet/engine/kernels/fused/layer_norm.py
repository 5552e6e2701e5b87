"""LayerNorm, alone or with the residual add before it: a row a program, held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from experimance_controlnet.engine.kernels.fused.quantise import scale_of
from experimance_controlnet.engine.kernels.quantise import Quantised, empty_quantised


@triton.jit
def _layer_norm_kernel(
    x_ptr, update_ptr, later_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, scales_ptr,
    columns, eps,
    ADD: tl.constexpr, ADD_LATER: tl.constexpr, QUANTISE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    at = row * columns + column
    value = tl.load(x_ptr + at, inside, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(update_ptr + at, inside, 0.0).to(tl.float32)).to(
            value.dtype
        )
        total = value
        if ADD_LATER:
            total = total.to(tl.float32) + tl.load(later_ptr + column, inside, 0.0).to(tl.float32)
        tl.store(total_ptr + at, total, inside)
    # of the rounded sum, as if the two were separate
    value = value.to(tl.float32)
    mean = tl.sum(value) / columns
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / columns + eps)
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
    normed = centred * scale * weight + bias
    if QUANTISE:
        row_scale = scale_of(tl.max(tl.abs(normed)))
        tl.store(scales_ptr + row, row_scale)
        tl.store(out_ptr + at, (normed / row_scale).to(tl.float8e4nv), inside)
    else:
        tl.store(out_ptr + at, normed, inside)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    out = torch.empty_like(x)
    _launch(x, weight, bias, eps, out)
    return out


def add_layer_norm(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, weight, bias, eps, out, update=update, total=total)
    return total, out


def layer_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> Quantised:
    out = empty_quantised(x.shape, x.device)
    _launch(x, weight, bias, eps, out)
    return out


def add_layer_norm_quantised(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    later: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Quantised]:
    total, out = torch.empty_like(x), empty_quantised(x.shape, x.device)
    _launch(x, weight, bias, eps, out, update=update, total=total, later=later)
    return total, out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out: torch.Tensor | Quantised,
    *,
    update: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    later: torch.Tensor | None = None,
) -> None:
    rows, columns = x.shape
    values, scales = (out.values, out.scales) if isinstance(out, Quantised) else (out, None)
    _layer_norm_kernel[(rows,)](
        x, update, later, weight, bias, total, values, scales, columns, eps,
        ADD=update is not None, ADD_LATER=later is not None, QUANTISE=scales is not None,
        COLUMNS=triton.next_power_of_2(columns), num_warps=4,
    )  # fmt: skip
