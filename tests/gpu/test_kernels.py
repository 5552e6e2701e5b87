"""The kernels as compiled for the device, at SDXL's shapes, against plain torch in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from experimance_controlnet.engine import kernels
from experimance_controlnet.engine.kernels import reference

pytestmark = pytest.mark.gpu

EPS = 1e-5
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error, relative to the largest value."""

UNET = [
    (torch.float16, channels, side)
    for channels, side in [(320, 128), (960, 128), (640, 64), (1920, 64), (1280, 32), (2560, 32)]
]
VAE = [
    (torch.bfloat16, channels, side)
    for channels, side in [(512, 128), (512, 256), (256, 512), (128, 512)]
]
IMAGES = pytest.mark.parametrize(("dtype", "channels", "side"), UNET + VAE)
TOKENS = pytest.mark.parametrize(("channels", "side"), [(640, 64), (1280, 32)])

Call = Callable[..., Any]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers whose mean is not 0."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda") + 0.5


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def check(
    name: str, dtype: torch.dtype, *inputs: torch.Tensor, call: Call | None = None
) -> torch.Tensor:
    """Compare the package's function with the reference of the same numbers; returns the first
    result. ``call`` hands the function what is no tensor of that precision.
    """
    rounded = [tensor.to(dtype) for tensor in inputs]
    call = call or (lambda function, *tensors: function(*tensors))
    found = call(getattr(kernels, name), *rounded)
    exact = call(getattr(reference, name), *[tensor.float() for tensor in rounded])
    found, exact = ((both,) if isinstance(both, torch.Tensor) else both for both in (found, exact))
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        error = (mine.float() - theirs).abs().max() / theirs.abs().max()
        assert error < BOUNDS[dtype]
        if mine.ndim == 4:
            assert mine.is_contiguous(memory_format=torch.channels_last)
    first: torch.Tensor = found[0]
    return first


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@IMAGES
def test_group_norm(dtype: torch.dtype, channels: int, side: int, shifted: bool) -> None:
    inputs = [image(2, channels, side, side), randn(channels, seed=1), randn(channels, seed=2)]
    inputs += [randn(2, channels, seed=3)] if shifted else []

    def call(function: Call, x: Any, weight: Any, bias: Any, shift: Any = None) -> Any:
        return function(x, weight, bias, 32, EPS, silu=True, shift=shift)

    first, second = (check("group_norm", dtype, *inputs, call=call) for _ in range(2))
    assert torch.equal(first, second)


@IMAGES
def test_add_bias(dtype: torch.dtype, channels: int, side: int) -> None:
    shape = (2, channels, side, side)
    check("add_bias", dtype, image(*shape), randn(channels, seed=1), image(*shape, seed=2))


@pytest.mark.parametrize(
    ("channels", "skip_channels", "side"),
    [(1280, 1280, 32), (1280, 640, 32), (1280, 640, 64), (640, 320, 128), (320, 320, 128)],
)
@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "control"])
def test_join(channels: int, skip_channels: int, side: int, controlled: bool) -> None:
    inputs = [image(2, channels, side, side), image(2, skip_channels, side, side, seed=1)]
    inputs += [image(2, skip_channels, side, side, seed=2)] if controlled else []
    strength = torch.tensor([0.7, 0.0], device="cuda") if controlled else None

    def call(function: Call, x: Any, skip: Any, control: Any = None) -> Any:
        return function(x, skip, control, strength)

    check("join", torch.float16, *inputs, call=call)


@pytest.mark.parametrize(("channels", "side"), [(512, 128), (512, 256), (256, 256)])
def test_interleave(channels: int, side: int) -> None:
    x = image(1, 4 * channels, side + 1, side + 1)
    check("interleave", torch.bfloat16, x, randn(channels, seed=1))


@TOKENS
def test_layer_norm(channels: int, side: int) -> None:
    inputs = randn(2 * side**2, channels), randn(channels, seed=1), randn(channels, seed=2)
    check("layer_norm", torch.float16, *inputs, call=lambda norm, *x: norm(*x, EPS))


@TOKENS
def test_add_layer_norm(channels: int, side: int) -> None:
    tokens = [randn(2 * side**2, channels, seed=seed) for seed in (0, 1)]
    inputs = *tokens, randn(channels, seed=2), randn(channels, seed=3)
    check("add_layer_norm", torch.float16, *inputs, call=lambda norm, *x: norm(*x, EPS))


@TOKENS
def test_geglu(channels: int, side: int) -> None:
    check("geglu", torch.float16, 3 * randn(2 * side**2, 8 * channels))
