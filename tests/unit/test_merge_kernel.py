"""Low-rank updates: the grouped kernel against plain torch; no GPU, then Triton's interpreter."""

from __future__ import annotations

import random

import pytest
import torch

from experimance_controlnet.engine.kernels.fused.merge import FusedPlan
from experimance_controlnet.engine.kernels.merge import (
    MergePlan,
    ReferencePlan,
    Target,
    Update,
    as_matrix,
    as_matrix_like,
    pad_rank,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [(64, 128), (1, 1), (33, 7), (65, 136), (5, 257), (130, 24)]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def update(rows: int, columns: int, rank: int, slot: int, dtype: torch.dtype) -> Update:
    up, down = randn(rows, rank, dtype=dtype, seed=slot), randn(rank, columns, dtype=dtype)
    return Update(up, down, scale=0.3 + slot, slot=slot)


def make_targets(
    dtype: torch.dtype, factors: torch.dtype, ranks: tuple[int, ...] = (32, 4)
) -> list[Target]:
    """One of each size, one without updates among them, one with fewer than the others."""
    targets = []
    for index, (rows, columns) in enumerate(SIZES):
        pristine = randn(rows, columns, dtype=dtype)
        updates = [update(rows, columns, rank, slot, factors) for slot, rank in enumerate(ranks)]
        targets.append(Target(pristine.clone(), pristine, updates[: index % 3]))
    return targets


def both(targets: list[Target], strengths: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per target what the kernel writes, and what the reference."""
    FusedPlan(targets).run(strengths)
    fused = [target.weight.clone() for target in targets]
    ReferencePlan(targets).run(strengths)
    return [(mine, target.weight.clone()) for mine, target in zip(fused, targets, strict=True)]


def assert_last_place(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the last place, where the order of sums and tf32 may show.

    The terms of the sums reach 8, so where they cancel their last place counts, not the result's.
    """
    epsilon = torch.finfo(mine.dtype).eps * (8 if mine.dtype == torch.float32 else 1)
    torch.testing.assert_close(mine, theirs, rtol=epsilon, atol=8 * epsilon)


@pytest.mark.parametrize("factors", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_kernel_is_the_reference(dtype: torch.dtype, factors: torch.dtype) -> None:
    targets = make_targets(dtype, factors)
    for mine, theirs in both(targets, [0.7, -1.2]):
        assert_last_place(mine, theirs)
    assert not any(
        torch.equal(target.weight, target.pristine) for target in targets if target.updates
    )


@pytest.mark.parametrize("rank", [1, 4, 16, 32, 48])
def test_every_rank(rank: int) -> None:
    for mine, theirs in both(make_targets(torch.float16, torch.float16, (rank, rank)), [1.0, 0.5]):
        assert_last_place(mine, theirs)


def test_factors_of_different_precision() -> None:
    rows, columns = 40, 48
    pristine = randn(rows, columns, dtype=torch.float16)
    updates = [update(rows, columns, 8, slot, dtype) for slot, dtype in enumerate(TYPES)]
    [(mine, theirs)] = both([Target(pristine.clone(), pristine, updates)], [0.1, 0.2, 0.3])
    assert_last_place(mine, theirs)


def test_rounding_is_to_nearest_and_once() -> None:
    # 1 + 2^-11 is halfway between two fp16 numbers; 2^-13 more decides.
    pristine = torch.ones(16, 16, dtype=torch.float16, device=DEVICE)
    up, down = torch.ones(16, 1, device=DEVICE), torch.ones(1, 16, device=DEVICE)
    halves = [Update(up, down, scale, 0) for scale in (2.0**-11, 2.0**-13)]
    for mine, theirs in both([Target(pristine.clone(), pristine, halves)], [1.0]):
        assert torch.equal(mine, torch.full_like(mine, 1 + 2.0**-10))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("plan", [FusedPlan, ReferencePlan])
def test_rows_of_a_larger_tensor(plan: type[FusedPlan] | type[ReferencePlan]) -> None:
    fused = randn(96, 40, dtype=torch.float16)
    before, middle = fused.clone(), fused[32:64]
    target = Target(middle, middle.clone(), [update(32, 40, 4, 0, torch.float16)])
    plan([target]).run([1.0])
    assert torch.equal(fused[:32], before[:32]) and torch.equal(fused[64:], before[64:])
    assert not torch.equal(middle, before[32:64])


@pytest.mark.parametrize("plan", [FusedPlan, ReferencePlan])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(24, 12, 3, 3), (24, 16, 1, 1), (4, 1, 3, 3), (1, 5, 2, 3)])
def test_convolutions_in_either_layout(
    plan: type[FusedPlan] | type[ReferencePlan],
    layout: torch.memory_format,
    shape: tuple[int, int, int, int],
) -> None:
    weight = randn(*shape).to(memory_format=layout)
    up, down = randn(shape[0], 3), randn(3, weight[0].numel())
    expected = weight + 2 * (up @ down).view(shape)
    matrix = as_matrix(weight)
    plan([Target(matrix, matrix.clone(), [Update(up, as_matrix_like(down, weight), 2.0, 0)])]).run(
        [1.0]
    )
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan_class", [FusedPlan, ReferencePlan])
def test_200_switches_are_exact(plan_class: type[FusedPlan] | type[ReferencePlan]) -> None:
    sizes = [(33, 24), (64, 17)]
    pristine = [randn(*size, dtype=torch.float16) for size in sizes]
    weights = [tensor.clone() for tensor in pristine]

    def plan(*slots: int) -> MergePlan:
        return plan_class(
            [
                Target(weight, copy, [update(*size, 4, slot, torch.float16) for slot in slots])
                for weight, copy, size in zip(weights, pristine, sizes, strict=True)
            ]
        )

    plans, draw = [plan(), plan(0), plan(1), plan(0, 1)], random.Random(1)
    plans[3].run([0.8, 0.4])
    first = [weight.clone() for weight in weights]
    for _ in range(200):
        draw.choice(plans).run([draw.uniform(-2, 2), draw.uniform(-2, 2)])
    plans[3].run([0.8, 0.4])
    assert all(map(torch.equal, weights, first))
    plans[0].run([])
    assert all(map(torch.equal, weights, pristine))


def test_no_updates_keep_every_bit() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    pristine = bits.view(torch.float16).nan_to_num().to(DEVICE)  # all numbers, -0 among them
    weight = torch.empty_like(pristine)
    FusedPlan([Target(weight, pristine, [])]).run([])
    assert torch.equal(weight.view(torch.int16), pristine.view(torch.int16))


def test_padding_keeps_the_product() -> None:
    up, down = randn(5, 4), randn(4, 6)
    padded = pad_rank(up, down)
    assert padded[0].shape == (5, 16) and padded[1].shape == (16, 6)
    torch.testing.assert_close(padded[0] @ padded[1], up @ down)


@pytest.mark.parametrize(
    ("up", "down", "pristine"),
    [
        ((4, 2), (2, 7), (4, 8)),
        ((5, 2), (2, 8), (4, 8)),
        ((4, 3), (2, 8), (4, 8)),
        ((4, 2), (2, 8), (3, 8)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    up: tuple[int, int], down: tuple[int, int], pristine: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="for"):
        Target(randn(4, 8), randn(*pristine), [Update(randn(*up), randn(*down), 1.0, 0)])


def test_memory_with_gaps_is_refused() -> None:
    weight = randn(4, 16)[:, ::2]
    with pytest.raises(ValueError, match="strides"):
        Target(weight, weight.clone(), [])
