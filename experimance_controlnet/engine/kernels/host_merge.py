"""Merging where matrices lie in the host's memory and the device does the arithmetic: the same bits
as where everything is on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experimance_controlnet.engine.kernels.merge import MergePlan, Target, make_plan


def plan_anywhere(targets: Sequence[Target]) -> MergePlan:
    """The plan for targets that are all alike: on the device, or with their pristine matrices, or
    their weights too, in its host's pinned memory.
    """
    if targets and targets[0].weight.is_pinned():
        return StagedPlan(targets)
    if targets and targets[0].pristine.device != targets[0].weight.device:
        return RestoringPlan(targets)
    return make_plan(targets)


class RestoringPlan:
    """Brings the pristine matrices to where the weights are, and merges in place there."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._in_place = make_plan([_in_place(target.weight, target) for target in targets])

    def run(self, strengths: Sequence[float]) -> None:
        for target in self._targets:
            target.weight.copy_(target.pristine, non_blocking=True)
        self._in_place.run(strengths)


class StagedPlan:
    """Brings one matrix at a time to the device of its updates, and the result back."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    def run(self, strengths: Sequence[float]) -> None:
        if torch.cuda.is_initialized():
            # weights may still be on their way to the device, for an evaluation before this
            torch.cuda.current_stream().synchronize()
        for target in self._targets:
            merged = target.pristine
            if target.updates:
                merged = merged.to(target.updates[0].up.device, non_blocking=True, copy=True)
                make_plan([_in_place(merged, target)]).run(strengths)
            target.weight.copy_(merged)


def _in_place(matrix: torch.Tensor, target: Target) -> Target:
    """The updates of ``target`` for a matrix that holds the pristine values already."""
    return Target(matrix, matrix, target.updates)
