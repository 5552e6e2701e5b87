"""The merger on layers of every shape, and its hold on weights that move."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from experimance_controlnet.engine.kernels.host_merge import RestoringPlan, StagedPlan
from experimance_controlnet.engine.kernels.merge import MergePlan, Target, Update, make_plan
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


def test_a_forgotten_adapter_is_held_by_nobody(layers: Layers) -> None:
    pristine, merger = weights(layers), AdapterMerger("unet", layers)
    leaving, staying = factors(layers, "a", *PATHS), factors(layers, "b", "q")
    for adapters in ([(staying, 1.0)], [(leaving, 1.0), (staying, 1.0)], [(leaving, 1.0)]):
        merger.apply(adapters)
    held = weakref.ref(leaving.deltas["unet"]["q"].up)
    del adapters
    merger.forget(leaving)
    del leaving
    assert held() is None
    assert not equal(weights(layers), pristine)  # it is merged still
    merger.apply([(staying, 1.0)])
    torch.testing.assert_close(weights(layers), merged(pristine, [(staying, 1.0)]))
    merger.apply([])
    assert equal(weights(layers), pristine)


def test_parked_copies_restore_to_the_bit(layers: Layers) -> None:
    pristine, merger = weights(layers), AdapterMerger("unet", layers)
    a, b = factors(layers, "a", "q", "conv"), factors(layers, "b", *PATHS)
    merger.apply([(a, 1.0)])
    merger.park()
    assert merger.pristine_bytes == sum(pristine[path].nbytes for path in ("q", "conv"))
    for adapters in ([(b, 0.5)], [(a, 1.0), (b, 0.5)]):
        merger.apply(adapters)
        torch.testing.assert_close(weights(layers), merged(pristine, adapters))
    merger.apply([])
    assert equal(weights(layers), pristine)


@pytest.mark.parametrize("make", [RestoringPlan, StagedPlan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plans_for_host_memory_write_the_same_bits(
    make: type[RestoringPlan | StagedPlan], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    pristine = [torch.randn(16, 24).to(dtype) for _ in range(3)]
    updates = [Update(torch.randn(16, 4), torch.randn(4, 24), 0.5, slot) for slot in (0, 1)]
    sets: tuple[list[Update], ...] = (updates, updates[1:], [])

    def run(plan: Callable[[list[Target]], MergePlan]) -> list[torch.Tensor]:
        found = [torch.full_like(matrix, 7) for matrix in pristine]
        triples = zip(found, pristine, sets, strict=True)
        plan([Target(*triple) for triple in triples]).run([0.3, -1.0])
        return found

    for one, other in zip(run(make), run(make_plan), strict=True):
        assert torch.equal(one, other)


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
