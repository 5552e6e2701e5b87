"""Weights that visit the device: here a CPU that gets copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from experimance_controlnet.engine.offload import stream_weights, to_host

CPU = torch.device("cpu")


@pytest.fixture
def module() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2, bias=False))
    return torch.nn.Sequential(*layers).requires_grad_(False)


def places(module: torch.nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in module.parameters()]


def test_nothing_but_the_place_changes(module: torch.nn.Sequential) -> None:
    x = torch.randn(3, 4)
    expected = module(x)
    parked = places(module)
    visited: list[bool] = []
    stream_weights(module, CPU)
    module[2].register_forward_pre_hook(lambda layer, _: visited.append(places(layer) != parked))
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
    assert visited == [True]
    assert places(module) == parked


def test_the_parked_weights_are_the_valid_ones(module: torch.nn.Sequential) -> None:
    stream_weights(module, CPU)
    x = torch.randn(3, 4)
    with torch.inference_mode():
        module(x)
        module.get_parameter("2.weight").zero_()
        assert not module(x).any()


def test_they_are_parked_after_an_error_too(module: torch.nn.Sequential) -> None:
    stream_weights(module, CPU)
    parked = places(module)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        module(torch.randn(3, 5))
    assert places(module) == parked


class Unpinnable(torch.nn.Linear):
    """There is no memory left for its weights."""

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        raise MemoryError


def test_all_layers_are_parked_or_none(module: torch.nn.Sequential) -> None:
    module.append(Unpinnable(2, 2))
    with pytest.raises(MemoryError):
        stream_weights(module, CPU)
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def test_a_copy_is_laid_out_alike() -> None:
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy = to_host(weight)
    assert copy.stride() == weight.stride() and torch.equal(copy, weight)
    assert copy.data_ptr() != weight.data_ptr()
