"""fp8 as the device computes it: the kernels at SDXL's shapes, a step, graphs, switches."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine import kernels
from experimance_controlnet.engine.graphs import Recorder, ReplayedWork
from experimance_controlnet.engine.kernels import quantise, reference
from experimance_controlnet.engine.kernels.quantise import (
    WeightCopy,
    empty_quantised,
    make_plan,
)
from experimance_controlnet.engine.lora import LoraFactors
from experimance_controlnet.engine.merger import AdapterMerger
from experimance_controlnet.engine.network.fp8 import Fp8Products
from experimance_controlnet.engine.network.unet import UnetNetwork
from experimance_controlnet.engine.precision import EMULATED_FP8
from experimance_controlnet.engine.request import Adapter
from experimance_controlnet.engine.sdxl import SdxlRunner
from tests.engine.conftest import DEPTH, TWO_ADAPTERS, draw_one, loaded
from tests.engine.oracle import all_equal, mean_difference
from tests.engine.random_unet import Evaluation, error, make_factors, make_unet, noise
from tests.unit.test_quantise import assert_quantised, dequantised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not quantise.is_supported(torch.device("cuda")),
        reason="needs compute capability 8.9",
    ),
]

EPS = 1e-5
TOKENS = pytest.mark.parametrize(("tokens", "channels"), [(8192, 640), (2048, 1280), (100, 1280)])
"""Two rows at 1024x1024; and 320x320, whose tokens are no multiple of 16."""
ROUNDING = 1e-5
"""Of sums in fp32 in another order, relative to a row's largest value."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") + 0.5).to(dtype)


@TOKENS
def test_layer_norm(tokens: int, channels: int) -> None:
    x, weight, bias = (randn(*s) for s in ((tokens, channels), (channels,), (channels,)))
    exact = reference.layer_norm(x.float(), weight.float(), bias.float(), EPS)
    found = kernels.layer_norm_quantised(x, weight, bias, EPS)
    assert_quantised(found, exact, rounding=ROUNDING)


@pytest.mark.parametrize("later", [False, True], ids=["", "later"])
@TOKENS
def test_add_layer_norm(tokens: int, channels: int, later: bool) -> None:
    x, update = (randn(tokens, channels, seed=seed) for seed in (0, 1))
    weight, bias, extra = (randn(channels, seed=seed) for seed in (2, 3, 4))
    found = kernels.add_layer_norm_quantised(x, update, weight, bias, EPS, extra if later else None)
    total = x + update
    exact = reference.layer_norm(total.float(), weight.float(), bias.float(), EPS)
    assert torch.equal(found[0], total + extra if later else total)
    assert_quantised(found[1], exact, rounding=ROUNDING)


@TOKENS
def test_geglu(tokens: int, channels: int) -> None:
    x, bias = 3 * randn(tokens, 8 * channels), randn(8 * channels, seed=1)
    exact = reference.geglu(x.float() + bias.float())
    assert_quantised(kernels.geglu_quantised(x, bias), exact, rounding=ROUNDING)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(wrong: float) -> None:
    x = randn(3, 640)
    x[1, 5] = wrong
    for found in (
        kernels.layer_norm_quantised(x, x[0], x[0], EPS),
        kernels.geglu_quantised(x, torch.zeros_like(x[0])),
    ):
        assert dequantised(found).isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1920, 640), (5120, 640), (640, 2560), (3840, 1280), (10240, 1280), (1280, 5120), (96, 32)],
)
@pytest.mark.parametrize("tokens", [100, 2048])
def test_product(tokens: int, rows: int, columns: int) -> None:
    x = quantise.quantise(randn(tokens, columns))
    weight = quantise.quantise(randn(rows, columns, seed=1, dtype=torch.float32) * columns**-0.5)
    found = kernels.scaled_product(x, weight, torch.float16)
    exact = reference.scaled_product(x, weight, torch.float32)
    assert (found.dtype, found.shape) == (torch.float16, (tokens, rows))
    # partial sums in few bits: about 0.01 at 5120 columns, beside the 0.03 of e4m3 itself
    assert error(found, exact) < 1.5e-2


def test_all_weights_in_one_launch() -> None:
    sizes = [(3840, 1280), (10240, 1280), (1280, 5120), (1920, 640), (640, 2560), (96, 32)]
    weights = [randn(*size, seed=seed) for seed, size in enumerate(sizes)]
    copies = [
        WeightCopy(weight, empty_quantised(weight.shape, weight.device)) for weight in weights
    ]
    plan = make_plan(copies)
    for factor in (1, -3):
        for weight in weights:
            weight.mul_(factor)
        plan.run()
        for one in copies:
            assert_quantised(one.quantised, one.weight.float(), rounding=1e-6)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Of middle size, fp16; tests build a network over a copy."""
    moved: UNet2DConditionModel = make_unet(64, 128, 256).half().cuda()
    return moved


@pytest.fixture
def network(unet: UNet2DConditionModel) -> tuple[UnetNetwork, AdapterMerger]:
    module = copy.deepcopy(unet)
    network, merger = UnetNetwork(module, Fp8Products()), AdapterMerger("unet", module)
    merger.on_write(network.weights_changed)
    return network, merger


def recorded(evaluation: Evaluation) -> ReplayedWork:
    """What replays it."""
    work = ReplayedWork(evaluation, Recorder(torch.device("cuda")))
    for _ in range(3):
        work()
    assert work.recorded
    return work


def adapter_sets(unet: UNet2DConditionModel) -> list[tuple[tuple[LoraFactors, float], ...]]:
    """None, and two others."""
    return [(), ((make_factors(unet, 1), 0.8),), ((make_factors(unet, 2), -0.8),)]


def test_a_step_is_near(unet: UNet2DConditionModel) -> None:
    exact = noise(UnetNetwork(copy.deepcopy(unet).float()))
    in_half = error(noise(UnetNetwork(copy.deepcopy(unet))), exact)
    in_fp8 = error(noise(UnetNetwork(copy.deepcopy(unet), Fp8Products())), exact)
    emulated = error(noise(UnetNetwork(copy.deepcopy(unet).float(), Fp8Products())), exact)
    assert 2 * in_half < in_fp8 < 0.05
    # nothing is lost but what rounding to e4m3 costs
    assert in_fp8 < 1.5 * emulated


def test_a_recorded_step_sees_other_adapters(
    unet: UNet2DConditionModel, network: tuple[UnetNetwork, AdapterMerger]
) -> None:
    evaluation, merger = Evaluation(network[0]), network[1]
    replayed = recorded(evaluation)
    found = []
    for adapters in adapter_sets(unet):
        merger.apply(adapters)
        replayed()
        found.append(evaluation.noise.clone())
        evaluation()
        # libraries may choose other algorithms when they are recorded
        assert error(found[-1], evaluation.noise.float()) < 2e-3
    assert min(error(found[i], found[0].float()) for i in (1, 2)) > 0.02


def test_20_switches_are_exact(
    unet: UNet2DConditionModel, network: tuple[UnetNetwork, AdapterMerger]
) -> None:
    evaluation, merger = Evaluation(network[0]), network[1]
    replayed, sets = recorded(evaluation), adapter_sets(unet)
    seen: dict[int, torch.Tensor] = {}
    for number in range(20):
        merger.apply(sets[number % 3])
        replayed()
        found = evaluation.noise.clone()
        assert torch.equal(found, seen.setdefault(number % 3, found))
    assert not torch.equal(seen[0], seen[1])


def test_pictures(catalog: Catalog, store: ModelStore) -> None:
    """Through the runner: near what a CPU emulates, and the same when the adapters come back."""
    runner = loaded(SdxlRunner(catalog, store, "cuda", "fp8"), "lightning")
    emulated = loaded(SdxlRunner(catalog, store, "cpu", EMULATED_FP8), "lightning")
    other = (Adapter("experimance_future", 1.0),)
    sets = [TWO_ADAPTERS, (), other, TWO_ADAPTERS, ()]
    pictures = [draw_one(runner, adapters=adapters, control=DEPTH) for adapters in sets]
    assert runner.precision == "fp8"
    assert all_equal([pictures[0], pictures[3]])
    assert all_equal([pictures[1], pictures[4]])
    for adapters, picture in zip(sets[:3], pictures, strict=False):
        expected = draw_one(emulated, adapters=adapters, control=DEPTH)
        assert mean_difference(picture, expected) < 3
