"""LayerNorm, alone or with the residual add before it: a row a program, held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _layer_norm_kernel(
    x_ptr, update_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, columns, eps,
    ADD: tl.constexpr, COLUMNS: tl.constexpr,
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
        tl.store(total_ptr + at, value, inside)
    # of the rounded sum, as if the two were separate
    value = value.to(tl.float32)
    mean = tl.sum(value) / columns
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / columns + eps)
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + at, centred * scale * weight + bias, inside)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    out = torch.empty_like(x)
    _launch(x, None, weight, bias, None, out, eps)
    return out


def add_layer_norm(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, update, weight, bias, total, out, eps)
    return total, out


def _launch(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    total: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
) -> None:
    rows, columns = x.shape
    _layer_norm_kernel[(rows,)](
        x, update, weight, bias, total, out, columns, eps,
        ADD=update is not None, COLUMNS=triton.next_power_of_2(columns), num_warps=4,
    )  # fmt: skip
