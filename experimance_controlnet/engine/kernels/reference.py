"""What each kernel means, in plain torch. See the package for shapes."""

from __future__ import annotations

import torch
from torch.nn import functional

from experimance_controlnet.engine.kernels.quantise import Quantised, quantise


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
    if shift is not None:
        x = x + shift.to(x.dtype)[..., None, None]
    normed = functional.group_norm(x, groups, weight, bias, eps)
    if silu:
        normed = functional.silu(normed)
    return normed.contiguous(memory_format=torch.channels_last)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + update
    return total, layer_norm(total, weight, bias, eps)


def layer_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> Quantised:
    return quantise(layer_norm(x, weight, bias, eps))


def add_layer_norm_quantised(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    later: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Quantised]:
    total, normed = add_layer_norm(x, update, weight, bias, eps)
    return total if later is None else total + later, quantise(normed)


def geglu(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


def geglu_quantised(x: torch.Tensor, bias: torch.Tensor) -> Quantised:
    return quantise(geglu(x + bias))


def scaled_product(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    product = a.values.float() @ b.values.float().t()
    return (product * a.scales * b.scales.t()).to(dtype)


def add_bias(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return x + bias[:, None, None] + residual


def join(
    x: torch.Tensor,
    skip: torch.Tensor,
    control: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    if control is not None and strength is not None:
        skip = skip + control * strength.to(control.dtype)[:, None, None, None]
    return torch.cat([x, skip], dim=1)


def interleave(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    images, height, width = x.shape[0], x.shape[2] - 1, x.shape[3] - 1
    image = torch.empty(
        (images, x.shape[1] // 4, 2 * height, 2 * width), dtype=x.dtype, device=x.device
    ).contiguous(memory_format=torch.channels_last)
    for corner, part in enumerate(x.chunk(4, dim=1)):
        down, right = divmod(corner, 2)
        image[:, :, down::2, right::2] = part[:, :, down : down + height, right : right + width]
    return image + bias[:, None, None]
