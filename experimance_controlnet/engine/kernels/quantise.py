"""Matrices in fp8, e4m3, with one scale a row, and the weights of a network made such at once.

A row's scale brings its largest value to e4m3's largest, 448; e4m3 has 3 bits after the leading
one, so a value is off by a sixteenth of itself at most. Weights have one scale an output channel,
activations one a token: what ``torch._scaled_mm`` calls row-wise scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-12
"""A row of zeros has a scale all the same."""
MULTIPLE = 16
"""Rows of a weight and its columns have to be multiples of this to be multiplied in fp8."""
CAPABILITY = (8, 9)
"""The compute capability from which matrix units know e4m3: Ada Lovelace, Hopper, and later."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix whose row i is ``scales[i] * values[i]``."""

    values: torch.Tensor  # (rows, columns) e4m3, contiguous
    scales: torch.Tensor  # (rows, 1) fp32, contiguous


def is_supported(device: torch.device) -> bool:
    """Whether the device multiplies such matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def fits(weight: torch.Tensor) -> bool:
    """Whether this weight (out, in) may be multiplied in fp8."""
    return all(size % MULTIPLE == 0 for size in weight.shape)


def empty_quantised(shape: Sequence[int], device: torch.device) -> Quantised:
    """(rows, columns), whose numbers are still to be written."""
    rows, columns = shape
    return Quantised(
        torch.empty((rows, columns), dtype=E4M3, device=device),
        torch.empty((rows, 1), dtype=torch.float32, device=device),
    )


def quantise(x: torch.Tensor) -> Quantised:
    """``x`` (rows, columns) in plain torch."""
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    return Quantised((x / scales).to(E4M3), scales)


@dataclass(frozen=True, slots=True, eq=False)
class WeightCopy:
    """A weight, and where its quantised copy is to be written.

    Raises:
        ValueError: the shapes do not belong together. Nothing that passes here lets a kernel leave
            the tensors it was given.
    """

    weight: torch.Tensor  # (rows, columns), dense rows
    quantised: Quantised

    def __post_init__(self) -> None:
        rows, columns = self.weight.shape
        values, scales = self.quantised.values, self.quantised.scales
        if self.weight.stride(1) != 1 or self.weight.numel() == 0:
            raise ValueError(f"a weight {rows} x {columns}, strides {self.weight.stride()}")
        if values.shape != (rows, columns) or scales.shape != (rows, 1):
            raise ValueError(f"{tuple(values.shape)} for {rows} x {columns}")
        if not (values.is_contiguous() and scales.is_contiguous()):
            raise ValueError("the copy of a weight must be contiguous")


class QuantisePlan(Protocol):
    """Prepared once for a set of copies, which it keeps alive, and run as often as wanted."""

    def run(self) -> None:
        """Write all copies anew, from the weights as they are then."""
        ...


class ReferencePlan:
    """In plain torch, a weight at a time."""

    def __init__(self, copies: Sequence[WeightCopy]) -> None:
        self._copies = copies

    def run(self) -> None:
        for copy in self._copies:
            fresh = quantise(copy.weight)
            copy.quantised.values.copy_(fresh.values)
            copy.quantised.scales.copy_(fresh.scales)


def make_plan(copies: Sequence[WeightCopy]) -> QuantisePlan:
    """All weights are on one device and of one precision."""
    if copies and copies[0].weight.is_cuda:
        try:
            from experimance_controlnet.engine.kernels.fused.quantise import FusedPlan
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
        else:
            return FusedPlan(copies)
    return ReferencePlan(copies)
