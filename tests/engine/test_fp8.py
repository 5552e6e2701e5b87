"""fp8 on the embedded model, by the reference kernels in fp32: its rounding, not its speed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.merger import AdapterMerger
from experimance_controlnet.engine.network.fp8 import Fp8Products
from experimance_controlnet.engine.network.products import Products
from experimance_controlnet.engine.network.unet import UnetNetwork
from experimance_controlnet.engine.precision import EMULATED_FP8, choose_precision
from experimance_controlnet.engine.request import Adapter
from experimance_controlnet.engine.sdxl import SdxlRunner
from experimance_controlnet.errors import SettingsError
from tests.engine.conftest import DEPTH, TWO_ADAPTERS, draw_one, loaded
from tests.engine.oracle import all_equal, mean_difference
from tests.engine.random_unet import error, make_factors, make_unet, noise
from tools.embedded_model import architecture

CPU = torch.device("cpu")
FP16_ERROR = 2e-3
"""What rounding to fp16 costs a UNet at most, relative to its output: BENCHMARKS.md."""
OTHER = (Adapter("experimance_future", 1.0),)


@pytest.fixture(scope="module")
def wide() -> UNet2DConditionModel:
    """Not to be changed. Every product fits; of the embedded UNet's only those 32 wide do."""
    return make_unet(16, 32, 64)


@pytest.fixture
def unet(wide: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(wide)


@pytest.fixture
def emulated(catalog: Catalog, store: ModelStore) -> SdxlRunner:
    return loaded(SdxlRunner(catalog, store, "cpu", EMULATED_FP8), "lightning")


def test_it_quantises_and_is_near(unet: UNet2DConditionModel) -> None:
    exact = noise(UnetNetwork(copy.deepcopy(unet)))
    found = noise(UnetNetwork(unet, Fp8Products()))
    assert FP16_ERROR < error(found, exact) < 0.05


@pytest.mark.parametrize("layer", ["attn1.to_q", "ff.net.0.proj", "ff.net.2"])
def test_each_of_its_products_is_quantised(unet: UNet2DConditionModel, layer: str) -> None:
    """A weight that is overwritten acts after it has been quantised anew, and not before."""
    network = UnetNetwork(unet, Fp8Products())
    before = noise(network)
    path = f"mid_block.attentions.0.transformer_blocks.1.{layer}.weight"
    with torch.inference_mode():
        unet.get_parameter(path).mul_(-3)
    assert torch.equal(noise(network), before)
    network.weights_changed()
    expected = noise(UnetNetwork(copy.deepcopy(unet), Fp8Products()))
    assert torch.equal(noise(network), expected)
    assert error(before, expected) > 1e-4


@pytest.mark.parametrize(
    "layer", ["attn1.to_out.0.weight", "attn2.to_q.weight", "ff.net.0.proj.bias", "ff.net.2.bias"]
)
def test_all_else_is_read_where_it_is(unet: UNet2DConditionModel, layer: str) -> None:
    network = UnetNetwork(unet, Fp8Products())
    before = noise(network)
    path = f"mid_block.attentions.0.transformer_blocks.1.{layer}"
    with torch.inference_mode():
        unet.get_parameter(path).mul_(-3).add_(0.1)
    expected = noise(UnetNetwork(copy.deepcopy(unet), Fp8Products()))
    assert torch.equal(noise(network), expected)
    assert not torch.equal(before, expected)


def test_layers_that_do_not_fit_stay_as_they_are() -> None:
    """Half of the embedded UNet's transformers are 40 wide, the others 32."""
    torch.manual_seed(5)
    unet = UNet2DConditionModel(**architecture.UNET).eval()
    exact = noise(UnetNetwork(copy.deepcopy(unet)))
    found = noise(UnetNetwork(unet, Fp8Products()))
    assert 1e-4 < error(found, exact) < 0.05
    odd = architecture.UNET | {"block_out_channels": (24, 40, 40), "attention_head_dim": (1, 2, 5)}
    unet = UNet2DConditionModel(**odd).eval()
    exact = noise(UnetNetwork(copy.deepcopy(unet)))
    assert torch.equal(noise(UnetNetwork(unet, Fp8Products())), exact)


def test_adapters_act_and_leave_nothing_behind(unet: UNet2DConditionModel) -> None:
    network = UnetNetwork(unet, Fp8Products())
    merger = AdapterMerger("unet", unet)
    merger.on_write(network.weights_changed)
    sets = [(), ((make_factors(unet, 1), 0.8),), ((make_factors(unet, 2), -0.8),)]
    seen: dict[int, torch.Tensor] = {}
    for number in (1, 0, 1, 2, 1, 0, 2):
        merger.apply(sets[number])
        found = noise(network)
        assert torch.equal(found, seen.setdefault(number, found))
        exact = noise(UnetNetwork(copy.deepcopy(unet)))
        assert FP16_ERROR < error(found, exact) < 0.05
    assert error(seen[1], seen[0]) > 0.05
    assert error(seen[2], seen[0]) > 0.05


def test_weights_that_moved_are_found_again(unet: UNet2DConditionModel) -> None:
    products = Fp8Products()
    network = UnetNetwork(unet, products)
    before = noise(network)
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    assert isinstance(layer, torch.nn.Linear)
    layer.weight.data = layer.weight.data * 2
    network.weights_changed()
    expected = noise(UnetNetwork(copy.deepcopy(unet), Fp8Products()))
    assert torch.equal(noise(network), expected)
    assert not torch.equal(before, expected)


class FailingOnce:
    """A listener that fails when it is first called."""

    def __init__(self, listener: Callable[[], None]) -> None:
        self._listener = listener
        self._failed = False

    def __call__(self) -> None:
        if not self._failed:
            self._failed = True
            raise RuntimeError("no memory")
        self._listener()


def test_a_failure_is_made_good_at_the_next_switch(unet: UNet2DConditionModel) -> None:
    products: Products = Fp8Products()
    network, merger = UnetNetwork(unet, products), AdapterMerger("unet", unet)
    merger.on_write(FailingOnce(network.weights_changed))
    wanted = [(make_factors(unet, 1), 0.8)]
    with pytest.raises(RuntimeError, match="no memory"):
        merger.apply(wanted)
    merger.apply(wanted)
    expected = noise(UnetNetwork(copy.deepcopy(unet), Fp8Products()))
    assert torch.equal(noise(network), expected)


def test_pictures(emulated: SdxlRunner, runner: SdxlRunner) -> None:
    """Near those in fp32, another for each set of adapters, and the same when it comes back."""
    sets = [TWO_ADAPTERS, (), OTHER, TWO_ADAPTERS, ()]
    pictures = [draw_one(emulated, adapters=adapters, control=DEPTH) for adapters in sets]
    assert all_equal([pictures[0], pictures[3]])
    assert all_equal([pictures[1], pictures[4]])
    exact = draw_one(runner, adapters=TWO_ADAPTERS, control=DEPTH)
    assert 0 < mean_difference(pictures[0], exact) < 5
    assert mean_difference(pictures[0], pictures[1]) > 0.5
    assert (emulated.precision, runner.precision) == ("fp8", "fp32")


@pytest.mark.parametrize("wish", ["fp16", "fp8"])
def test_a_cpu_has_neither(catalog: Catalog, store: ModelStore, wish: str) -> None:
    with pytest.raises(SettingsError, match=rf"PRECISION \(--precision\): {wish} needs a CUDA"):
        SdxlRunner(catalog, store, "cpu", wish)


def test_auto_on_a_cpu_is_fp32() -> None:
    assert choose_precision("auto", CPU).name == "fp32"
