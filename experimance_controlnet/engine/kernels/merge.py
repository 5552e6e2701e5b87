"""Low-rank updates of many matrices at once: ``weight = round(pristine + sum of s * up @ down)``.

Sums are taken in fp32 whatever the precision of the weights and factors, and rounded to the
weight's precision once, to the nearest. A matrix without updates becomes the pristine one to the
bit. The same call gives the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

RANK_MULTIPLE = 16
"""Matrix units multiply no narrower tiles; zeros that fill a rank up change nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """``strengths[slot] * scale * up @ down``."""

    up: torch.Tensor  # (rows, rank)
    down: torch.Tensor  # (rank, columns)
    scale: float
    slot: int


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One matrix to write, and what to write into it.

    Raises:
        ValueError: the shapes do not belong together. Nothing that passes here lets a kernel leave
            the tensors it was given.
    """

    weight: torch.Tensor  # (rows, columns), dense rows; may be rows of a larger tensor
    pristine: torch.Tensor  # (rows, columns), same precision
    updates: Sequence[Update]

    def __post_init__(self) -> None:
        rows, columns = self.weight.shape
        for tensor in (self.weight, self.pristine):
            if tensor.shape != (rows, columns) or tensor.stride(1) != 1:
                raise ValueError(f"{tensor.shape} with strides {tensor.stride()} for {rows} rows")
        if self.pristine.dtype != self.weight.dtype or self.weight.numel() == 0:
            raise ValueError(f"{self.pristine.dtype} for {rows} x {columns} {self.weight.dtype}")
        for update in self.updates:
            up, down = tuple(update.up.shape), tuple(update.down.shape)
            if up != (rows, down[0]) or down != (up[1], columns):
                raise ValueError(f"update {up} x {down} for {rows} x {columns}")


class MergePlan(Protocol):
    """Prepared once for a set of targets, which it keeps alive, and run as often as wanted."""

    def run(self, strengths: Sequence[float]) -> None:
        """Write all targets. ``strengths`` has one for each slot."""
        ...


class ReferencePlan:
    """In plain torch, a target at a time."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    def run(self, strengths: Sequence[float]) -> None:
        for target in self._targets:
            _merge(target, strengths)


def make_plan(targets: Sequence[Target]) -> MergePlan:
    """All targets are on one device; there, factors are padded to :data:`RANK_MULTIPLE`."""
    if targets and targets[0].weight.is_cuda:
        try:
            from experimance_controlnet.engine.kernels.fused.merge import FusedPlan
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
        else:
            return FusedPlan(targets)
    return ReferencePlan(targets)


def _merge(target: Target, strengths: Sequence[float]) -> None:
    in_place = target.weight.dtype == torch.float32
    total = target.weight.copy_(target.pristine) if in_place else target.pristine.float()
    for update in target.updates:
        alpha = update.scale * strengths[update.slot]
        total.addmm_(update.up.float(), update.down.float(), alpha=alpha)
    if not in_place:
        target.weight.copy_(total)


def pad_rank(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the same product whose rank is a multiple of :data:`RANK_MULTIPLE`."""
    missing = -len(down) % RANK_MULTIPLE
    if missing == 0:
        return up, down
    pad = torch.nn.functional.pad
    return pad(up, (0, missing)), pad(down, (0, 0, 0, missing))


def storage_order(weight: torch.Tensor) -> tuple[int, ...]:
    """The dimensions after the first, from the outermost in memory to the innermost.

    ``(1, 2, 3)`` for a contiguous convolution, ``(2, 3, 1)`` for one in channels_last.
    """
    return tuple(sorted(range(1, weight.ndim), key=lambda d: weight.stride(d), reverse=True))


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A view of the weight as (rows, everything else in the order of memory).

    Raises:
        RuntimeError: there is none, because the weight's memory has gaps within a row.
    """
    return weight.detach().permute(0, *storage_order(weight)).view(len(weight), -1)


def as_matrix_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``tensor`` (n, all that follows in ``weight.shape``) in the order of ``as_matrix(weight)``.

    A view where that is possible.

    Raises:
        ValueError: it has another number of columns.
    """
    if tensor[0].numel() != weight[0].numel():
        raise ValueError(f"{tuple(tensor.shape)} for a weight of {tuple(weight.shape)}")
    logical = tensor.reshape(len(tensor), *weight.shape[1:])
    return logical.permute(0, *storage_order(weight)).reshape(len(tensor), -1)
