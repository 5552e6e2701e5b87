"""Adapters on layers as large as SDXL's, through the compiled kernel."""

from __future__ import annotations

import random

import pytest
import torch

from experimance_controlnet.engine.kernels.merge import (
    ReferencePlan,
    Target,
    Update,
    make_plan,
    pad_rank,
)

pytestmark = pytest.mark.gpu

C = 1280
SHAPES = [(C, C), (C, C), (C, 2048), (8 * C, C), (C, 4 * C), (C // 2, C // 2), (320, 36)]
"""The layers of a transformer block, and a convolution whose rows fit no vector."""
TYPES = [torch.float16, torch.bfloat16, torch.float32]


def make(dtype: torch.dtype, factors: torch.dtype, rank: int, adapters: int) -> list[Target]:
    torch.manual_seed(0)
    targets = []
    for rows, columns in SHAPES:
        pristine = (torch.randn(rows, columns, device="cuda") * columns**-0.5).to(dtype)
        updates = []
        for slot in range(adapters):
            up = torch.randn(rows, rank, device="cuda") * 0.02
            down = torch.randn(rank, columns, device="cuda") * 0.1
            updates.append(Update(*pad_rank(up.to(factors), down.to(factors)), 1.0, slot))
        targets.append(Target(pristine.clone(), pristine, updates))
    return targets


@pytest.mark.parametrize("rank", [4, 32, 128])
@pytest.mark.parametrize("factors", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_kernel_is_the_reference(dtype: torch.dtype, factors: torch.dtype, rank: int) -> None:
    targets, strengths = make(dtype, factors, rank, adapters=2), [0.8, 0.4]
    make_plan(targets).run(strengths)
    mine = [target.weight.clone() for target in targets]
    ReferencePlan(targets).run(strengths)
    for weight, target in zip(mine, targets, strict=True):
        epsilon = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
        # tf32 factors show where pristine weight and update cancel
        torch.testing.assert_close(weight, target.weight, rtol=epsilon, atol=epsilon / 8)


def test_200_switches_are_exact() -> None:
    targets = make(torch.float16, torch.float16, 32, adapters=2)
    kept = [(0, 1), (0,), (1,), ()]
    plans = [
        make_plan(
            [Target(t.weight, t.pristine, [t.updates[slot] for slot in slots]) for t in targets]
        )
        for slots in kept
    ]
    plans[0].run([0.8, 0.4])
    first = [target.weight.clone() for target in targets]
    draw = random.Random(1)
    for _ in range(200):
        draw.choice(plans).run([draw.uniform(-2, 2), draw.uniform(-2, 2)])
    plans[0].run([0.8, 0.4])
    assert all(map(torch.equal, [target.weight for target in targets], first))
    plans[-1].run([])
    assert all(torch.equal(target.weight, target.pristine) for target in targets)
