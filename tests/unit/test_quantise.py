"""fp8: the kernels that quantise, against plain torch; no GPU, then Triton's interpreter.

The interpreter's cast to e4m3 halves what rounds up to the next power of two, and what is below
2^-6 it rounds somehow. There, the former are left out and the latter have to be small, no more;
tests/gpu has no such exceptions.
"""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.engine.kernels import fused, quantise, reference
from experimance_controlnet.engine.kernels.fused.quantise import FusedPlan
from experimance_controlnet.engine.kernels.quantise import (
    E4M3_MAX,
    Quantised,
    ReferencePlan,
    WeightCopy,
    empty_quantised,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.5).to(DEVICE, dtype)


def dequantised(x: Quantised) -> torch.Tensor:
    return x.values.float() * x.scales


def half_a_step(exact: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What rounding to the nearest costs at most: steps of an eighth of the power of two below a
    number, and of 2^-9 below 2^-6.
    """
    powers = (exact / scales).abs().clamp_min(2**-6).log2().floor().exp2()
    return powers / 16 * scales


def carries(exact: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Where rounding leads to the next power of two."""
    scaled = (exact / scales).abs()
    powers = scaled.clamp_min(2**-6).log2().floor().exp2()
    return scaled >= powers * (2 - 1 / 16) * 0.999


def assert_quantised(found: Quantised, exact: torch.Tensor, *, rounding: float = 1e-6) -> None:
    """``found`` is ``exact`` (fp32) to the nearest. ``rounding``: relative error before that."""
    assert found.values.dtype == quantise.E4M3
    assert found.values.is_contiguous() and found.scales.is_contiguous()
    expected = quantise.quantise(exact)
    torch.testing.assert_close(found.scales, expected.scales, rtol=rounding, atol=0)
    assert found.scales.shape == (len(exact), 1)
    error = (dequantised(found) - exact).abs()
    largest = exact.abs().amax(dim=1, keepdim=True)
    near = error <= half_a_step(exact, found.scales) + rounding * largest
    if DEVICE.type == "cpu":
        carried = carries(exact, found.scales)
        assert carried.float().mean() < 0.1
        small = exact.abs() < found.scales * 2**-6
        near |= carried | (small & (error <= found.scales * 2**-6))
    assert bool(near.all())


def test_rounding_of_the_reference() -> None:
    """A row's largest value is 448; a sixteenth is lost at most; zeros and signs stay."""
    x = torch.tensor([[0.0, -896.0, 2.0, 36.0], [0.0, 0.0, 0.0, 0.0]])
    found = quantise.quantise(x)
    assert found.scales[0] == 2.0
    assert found.values.float().tolist()[0] == [0.0, -448.0, 1.0, 18.0]
    assert torch.equal(dequantised(found), x)
    x = randn(50, 64)
    assert bool((dequantised(quantise.quantise(x)) - x).abs().amax() <= x.abs().amax() / 16)
    assert float(quantise.quantise(x).values.float().abs().amax(dim=1).min()) == E4M3_MAX


@pytest.mark.parametrize("columns", [32, 40, 80])
@pytest.mark.parametrize("dtype", TYPES)
def test_layer_norm(dtype: torch.dtype, columns: int) -> None:
    x, weight, bias = (randn(*s, dtype=dtype) for s in ((7, columns), (columns,), (columns,)))
    exact = reference.layer_norm(x.float(), weight.float(), bias.float(), EPS)
    assert_quantised(fused.layer_norm_quantised(x, weight, bias, EPS), exact)
    assert_quantised(
        reference.layer_norm_quantised(x, weight, bias, EPS),
        exact,
        rounding=2 * torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("later", [False, True], ids=["", "later"])
# not bf16: the interpreter cuts off where it should round
@pytest.mark.parametrize("columns", [32, 40, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_layer_norm(dtype: torch.dtype, columns: int, later: bool) -> None:
    x, update = (randn(7, columns, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, bias, extra = (randn(columns, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    found = fused.add_layer_norm_quantised(x, update, weight, bias, EPS, extra if later else None)
    total = x + update
    exact = reference.layer_norm(total.float(), weight.float(), bias.float(), EPS)
    assert torch.equal(found[0], total + extra if later else total)
    assert_quantised(found[1], exact)


@pytest.mark.parametrize("columns", [16, 40, 640, 1280])
@pytest.mark.parametrize("dtype", TYPES)
def test_geglu(dtype: torch.dtype, columns: int) -> None:
    x, bias = randn(5, 2 * columns, dtype=dtype), randn(2 * columns, dtype=dtype, seed=1)
    exact = reference.geglu(x.float() + bias.float())
    assert_quantised(fused.geglu_quantised(x, bias), exact)


def test_rows_of_zeros() -> None:
    x = torch.zeros((3, 64), device=DEVICE)
    nothing, ones = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)
    for found in (
        fused.layer_norm_quantised(x, ones, nothing, EPS),
        fused.geglu_quantised(x, nothing),
        quantise.quantise(x),
    ):
        assert not dequantised(found).any()
        assert bool((found.scales > 0).all())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(wrong: float) -> None:
    x = randn(3, 64)
    x[1, 5] = wrong
    found = quantise.quantise(x)
    assert dequantised(found).isfinite().all(dim=1).tolist() == [True, False, True]


SIZES = [(16, 16), (48, 32), (24, 272), (64, 640), (16, 1280)]


@pytest.mark.parametrize("dtype", TYPES)
def test_all_weights_in_one_launch(dtype: torch.dtype) -> None:
    weights = [randn(*size, dtype=dtype, seed=seed) for seed, size in enumerate(SIZES)]
    # rows of a larger tensor
    weights.append(randn(96, 32, dtype=dtype)[32:64])
    copies = [WeightCopy(weight, empty_quantised(weight.shape, DEVICE)) for weight in weights]
    plan = FusedPlan(copies)
    plan.run()
    for copy in copies:
        assert_quantised(copy.quantised, copy.weight.float())
    for weight in weights:
        weight.mul_(-3)
    plan.run()
    for copy in copies:
        assert_quantised(copy.quantised, copy.weight.float())


def test_the_reference_plan_writes_in_place() -> None:
    weight = randn(32, 48)
    copy = WeightCopy(weight, empty_quantised(weight.shape, DEVICE))
    places = copy.quantised.values.data_ptr(), copy.quantised.scales.data_ptr()
    plan = ReferencePlan([copy])
    plan.run()
    assert_quantised(copy.quantised, weight)
    weight.mul_(0.3)
    plan.run()
    assert_quantised(copy.quantised, weight)
    assert places == (copy.quantised.values.data_ptr(), copy.quantised.scales.data_ptr())


@pytest.mark.parametrize("shape", [(32, 16), (16, 48), (16, 32, 1)])
def test_a_copy_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        WeightCopy(randn(16, 32), empty_quantised(shape, DEVICE))


def test_a_weight_whose_rows_are_not_dense_is_refused() -> None:
    with pytest.raises(ValueError, match="strides"):
        WeightCopy(randn(32, 16).t(), empty_quantised((16, 32), DEVICE))


@pytest.mark.parametrize("columns", [24, 40])
def test_rows_that_fit_no_vector_are_refused(columns: int) -> None:
    copy = WeightCopy(randn(16, columns), empty_quantised((16, columns), DEVICE))
    with pytest.raises(ValueError, match="strides"):
        FusedPlan([copy])


def test_the_product_of_the_reference() -> None:
    a, b = quantise.quantise(randn(7, 32)), quantise.quantise(randn(48, 32, seed=1))
    exact = dequantised(a) @ dequantised(b).t()
    found = reference.scaled_product(a, b, torch.float32)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert reference.scaled_product(a, b, torch.float16).dtype == torch.float16
