"""The fused kernels against plain torch in fp32; no GPU, then Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from experimance_controlnet.engine.kernels import fused, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5

Call = Callable[..., Any]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers whose mean is not 0, so that forgetting to subtract it shows."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.5).to(DEVICE)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def both(
    name: str, dtype: torch.dtype, *inputs: torch.Tensor | None, call: Call | None = None
) -> tuple[Any, Any]:
    """What the kernel makes of the inputs in ``dtype``, and the reference of the same in fp32.

    ``call`` hands the function what is no tensor of that precision.
    """
    rounded = [None if tensor is None else tensor.to(dtype) for tensor in inputs]
    exact = [None if tensor is None else tensor.float() for tensor in rounded]
    call = call or (lambda function, *tensors: function(*tensors))
    return call(getattr(fused, name), *rounded), call(getattr(reference, name), *exact)


def assert_near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal but for the order of sums in fp32, or for rounding to half precision."""
    assert found.dtype == dtype
    full = dtype == torch.float32
    relative = 1e-5 if full else torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.float(), exact, rtol=relative, atol=relative * (1 if full else 4)
    )


def assert_channels_last(tensor: torch.Tensor) -> None:
    assert tensor.is_contiguous(memory_format=torch.channels_last)


def grouped(groups: int, *, silu: bool) -> Call:
    """Calls group_norm on x, weight, bias and the shift."""
    return lambda function, x, weight, bias, shift: function(
        x, weight, bias, groups, EPS, silu=silu, shift=shift
    )


def shifts(rows: int, channels: int) -> dict[str, torch.Tensor | None]:
    # a block's share of what all blocks' projections gave: its rows lie apart
    share = randn(rows, channels + 5, seed=4)[:, 3 : channels + 3]
    return {
        "none": None,
        "of_channels": randn(channels, seed=3),
        "of_images": randn(rows, channels, seed=3),
        "share": share,
    }


SHIFTS = ["none", "of_channels", "of_images", "share"]
NORMS = [(24, 8, 9, 9), (40, 8, 12, 7), (320, 32, 6, 5), (24, 8, 40, 40), (40, 8, 33, 41)]
"""Channels, groups, height, width; the last two take the way for large images."""


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize(("channels", "groups", "height", "width"), NORMS)
def test_group_norm(
    channels: int, groups: int, height: int, width: int, kind: str, silu: bool
) -> None:
    inputs = image(2, channels, height, width), randn(channels, seed=1), randn(channels, seed=2)
    shift = shifts(2, channels)[kind]
    found, exact = both(
        "group_norm", torch.float32, *inputs, shift, call=grouped(groups, silu=silu)
    )
    assert_near(found, exact, torch.float32)
    assert_channels_last(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"), [(320, 32, 6, 5), (40, 8, 40, 40)]
)
def test_group_norm_in_half_precision(
    channels: int, groups: int, height: int, width: int, dtype: torch.dtype
) -> None:
    inputs = image(2, channels, height, width), randn(channels, seed=1), randn(channels, seed=2)
    shift = randn(2, channels, seed=3)
    found, exact = both("group_norm", dtype, *inputs, shift, call=grouped(groups, silu=True))
    assert_near(found, exact, dtype)


@pytest.mark.parametrize("side", [9, 40])
def test_group_norm_of_any_layout(side: int) -> None:
    x, weight, bias = randn(2, 40, side, side), randn(40, seed=1), randn(40, seed=2)
    found = fused.group_norm(x, weight, bias, 8, EPS)
    assert torch.equal(found, fused.group_norm(image(2, 40, side, side), weight, bias, 8, EPS))
    assert_channels_last(found)


@pytest.mark.parametrize("side", [9, 40])
def test_group_norm_gives_the_same_bits(side: int) -> None:
    inputs = image(2, 40, side, side), randn(40, seed=1), randn(40, seed=2)
    first, second = (fused.group_norm(*inputs, 8, EPS, silu=True) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("columns", [32, 40, 70])
@pytest.mark.parametrize("dtype", TYPES)
def test_layer_norm(dtype: torch.dtype, columns: int) -> None:
    inputs = randn(7, columns), randn(columns, seed=1), randn(columns, seed=2)
    found, exact = both("layer_norm", dtype, *inputs, call=lambda norm, *x: norm(*x, EPS))
    assert_near(found, exact, dtype)


@pytest.mark.parametrize("columns", [32, 40, 70])
@pytest.mark.parametrize("dtype", TYPES)
def test_add_layer_norm(dtype: torch.dtype, columns: int) -> None:
    inputs = randn(7, columns), randn(7, columns, seed=1), randn(columns, seed=2)
    bias = randn(columns, seed=3)
    found, exact = both("add_layer_norm", dtype, *inputs, bias, call=lambda norm, *x: norm(*x, EPS))
    for mine, theirs in zip(found, exact, strict=True):
        assert_near(mine, theirs, dtype)


@pytest.mark.parametrize("columns", [40, 1200])
@pytest.mark.parametrize("dtype", TYPES)
def test_geglu(dtype: torch.dtype, columns: int) -> None:
    found, exact = both("geglu", dtype, 3 * randn(5, 2 * columns))
    assert found.shape == (5, columns)
    assert_near(found, exact, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_add_bias(dtype: torch.dtype) -> None:
    inputs = image(2, 40, 5, 7), randn(40, seed=1), image(2, 40, 5, 7, seed=2)
    found, exact = both("add_bias", dtype, *inputs)
    assert_near(found, exact, dtype)
    assert_channels_last(found)


def test_add_bias_of_any_layout() -> None:
    x, bias, residual = randn(2, 40, 5, 7), randn(40, seed=1), randn(2, 40, 5, 7, seed=2)
    found, exact = both("add_bias", torch.float32, x, bias, residual)
    assert_near(found, exact, torch.float32)
    assert_channels_last(found)


def with_strength(function: Call, *tensors: torch.Tensor) -> torch.Tensor:
    """Calls join with a control; the second image's does not act. Strengths are always fp32."""
    joined: torch.Tensor = function(*tensors, torch.tensor([0.7, 0.0], device=DEVICE))
    return joined


@pytest.mark.parametrize(("channels", "skip_channels"), [(40, 70), (64, 64), (24, 3)])
@pytest.mark.parametrize("dtype", TYPES)
def test_join(dtype: torch.dtype, channels: int, skip_channels: int) -> None:
    x, skip = image(2, channels, 5, 7), image(2, skip_channels, 5, 7, seed=1)
    found, exact = both("join", dtype, x, skip)
    assert torch.equal(found.float(), exact)
    assert_channels_last(found)


@pytest.mark.parametrize(("channels", "skip_channels"), [(40, 70), (64, 64), (24, 3)])
@pytest.mark.parametrize("dtype", TYPES)
def test_join_with_control(dtype: torch.dtype, channels: int, skip_channels: int) -> None:
    x = image(2, channels, 5, 7)
    skip, control = (image(2, skip_channels, 5, 7, seed=seed) for seed in (1, 2))
    found, exact = both("join", dtype, x, skip, control, call=with_strength)
    assert_near(found, exact, dtype)
    assert_channels_last(found)
    assert torch.equal(found[1, channels:], skip[1].to(dtype))


def test_join_of_any_layout() -> None:
    tensors = [randn(2, channels, 5, 7, seed=channels) for channels in (40, 70, 70)]
    found, exact = both("join", torch.float32, *tensors, call=with_strength)
    assert_near(found, exact, torch.float32)
    assert_channels_last(found)


@pytest.mark.parametrize(("channels", "height", "width"), [(12, 5, 7), (70, 3, 33)])
@pytest.mark.parametrize("dtype", TYPES)
def test_interleave(dtype: torch.dtype, channels: int, height: int, width: int) -> None:
    x = image(2, 4 * channels, height + 1, width + 1)
    found, exact = both("interleave", dtype, x, randn(channels, seed=1))
    assert found.shape == (2, channels, 2 * height, 2 * width)
    assert_near(found, exact, dtype)
    assert_channels_last(found)


def test_interleave_of_any_layout() -> None:
    found, exact = both("interleave", torch.float32, randn(2, 48, 6, 8), randn(12, seed=1))
    assert_near(found, exact, torch.float32)
    assert_channels_last(found)
