"""The merger on layers of every shape, and its hold on weights that move."""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.engine.lora import LoraFactors, LowRankDelta
from experimance_controlnet.engine.merger import AdapterMerger


class Layers(torch.nn.Module):
    """Two linear layers that share a tensor, as fused projections do, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
        self.fused = torch.randn(16, 8)
        for layer, rows in ((self.q, self.fused[:8]), (self.k, self.fused[8:])):
            layer.weight = torch.nn.Parameter(rows, requires_grad=False)
        self.conv = torch.nn.Conv2d(3, 5, 3).requires_grad_(False)
        self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


PATHS = ("q", "k", "conv")


@pytest.fixture
def layers() -> Layers:
    torch.manual_seed(0)
    return Layers()


def weights(layers: Layers) -> dict[str, torch.Tensor]:
    return {path: layers.get_parameter(f"{path}.weight").clone() for path in PATHS}


def factors(layers: Layers, name: str, *paths: str) -> LoraFactors:
    deltas = {}
    for path, weight in weights(layers).items():
        if path in paths:
            down, up = torch.randn(2, weight[0].numel()), torch.randn(len(weight), 2)
            deltas[path] = LowRankDelta(down, up, scale=0.5)
    return LoraFactors(name, {"unet": deltas})


def merged(
    pristine: dict[str, torch.Tensor], adapters: list[tuple[LoraFactors, float]]
) -> dict[str, torch.Tensor]:
    expected = {path: weight.clone() for path, weight in pristine.items()}
    for adapter, strength in adapters:
        for path, delta in adapter.deltas["unet"].items():
            update = strength * delta.scale * delta.up @ delta.down
            expected[path] += update.view(expected[path].shape)
    return expected


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[path], right[path]) for path in PATHS)


def test_views_and_layouts(layers: Layers) -> None:
    pristine, merger = weights(layers), AdapterMerger("unet", layers)
    adapters = [(factors(layers, "a", "q", "conv"), 0.7), (factors(layers, "b", "q", "k"), -0.2)]
    merger.apply(adapters)
    torch.testing.assert_close(weights(layers), merged(pristine, adapters))
    assert torch.equal(layers.fused, torch.cat([layers.q.weight, layers.k.weight]))
    merger.apply([])
    assert equal(weights(layers), pristine)


def test_layers_that_only_the_last_adapter_touched_are_put_back(layers: Layers) -> None:
    pristine, merger = weights(layers), AdapterMerger("unet", layers)
    a, b = factors(layers, "a", "q"), factors(layers, "b", "k", "conv")
    for adapters in ([(a, 1.0)], [(b, 1.0)], [(a, 1.0)]):
        merger.apply(adapters)
        torch.testing.assert_close(weights(layers), merged(pristine, adapters))


def test_more_sets_than_plans_are_kept(layers: Layers) -> None:
    pristine, merger = weights(layers), AdapterMerger("unet", layers)
    adapters = [factors(layers, str(index), *PATHS) for index in range(20)]
    for adapter in adapters + adapters[::-1]:
        merger.apply([(adapter, 0.5)])
        torch.testing.assert_close(weights(layers), merged(pristine, [(adapter, 0.5)]))


def test_copies_are_given_back(layers: Layers) -> None:
    pristine, merger = weights(layers), AdapterMerger("unet", layers)
    assert merger.pristine_bytes == 0
    adapter = factors(layers, "a", *PATHS)
    merger.apply([(adapter, 1.0)])
    assert merger.pristine_bytes == sum(weight.nbytes for weight in pristine.values())
    merger.release_pristine()
    assert merger.pristine_bytes == 0
    assert equal(weights(layers), pristine)


def test_other_weights_after_a_release(layers: Layers) -> None:
    merger, adapter = AdapterMerger("unet", layers), factors(layers, "a", *PATHS)
    merger.apply([(adapter, 1.0)])
    merger.release_pristine()
    layers.q = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    pristine = weights(layers)
    merger.apply([(adapter, 1.0)])
    torch.testing.assert_close(weights(layers), merged(pristine, [(adapter, 1.0)]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_that_moved_are_found_again(layers: Layers, layout: torch.memory_format) -> None:
    pristine, merger = weights(layers), AdapterMerger("unet", layers)
    adapter = factors(layers, "a", *PATHS)
    merger.apply([(adapter, 1.0)])
    for path in PATHS:
        parameter = layers.get_parameter(f"{path}.weight")
        parameter.data = parameter.data.clone()
    layers.conv.weight.data = layers.conv.weight.data.clone(memory_format=layout)
    merger.apply([(adapter, 0.5)])
    torch.testing.assert_close(weights(layers), merged(pristine, [(adapter, 0.5)]))
    merger.apply([])
    assert equal(weights(layers), pristine)
