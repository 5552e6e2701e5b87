"""What waits in the host's memory, against a memory that is counted by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch

from experimance_controlnet.engine.host_cache import HostCache, Parked, copy_to_host
from experimance_controlnet.engine.request import Asset
from experimance_controlnet.engine.residency import Residency
from experimance_controlnet.engine.resting import AtRest, Key, total_bytes

KEY: Key = ("unet", "weight")
A, B, C, D = (Asset("model", name) for name in "abcd")
LORA_OF_A = Asset("lora", "l", "a")


class Whole:
    """A frame around nothing."""

    def build(self, tensors: Mapping[Key, torch.Tensor]) -> object:
        return tensors


def at_rest(size: int = 3, value: int = 0) -> AtRest:
    """So many bytes on the device."""
    return AtRest(Whole(), {KEY: torch.full((size,), value, dtype=torch.uint8)}, on_host={})


class Host:
    """10 bytes, of which parked tensors take what they are long."""

    def __init__(self) -> None:
        self.releases = 0
        self.cache = HostCache(self.free, self.release, pin=False)

    def free(self) -> int:
        return 10 - sum(total_bytes(parked.tensors) for parked in self.cache._copies.values())

    def release(self) -> None:
        self.releases += 1

    @property
    def parked(self) -> list[str]:
        return list(self.cache.names("model"))


@pytest.fixture
def host() -> Host:
    return Host()


def found(host: Host, asset: Asset) -> Parked:
    parked = host.cache.find(asset)
    assert parked is not None
    return parked


def test_what_is_parked_is_a_copy(host: Host) -> None:
    model = at_rest(value=7)
    assert host.cache.park(A, model)
    model.on_device[KEY].zero_()
    assert found(host, A).tensors[KEY].tolist() == [7, 7, 7]
    assert host.parked == ["a"]


def test_what_lives_on_the_host_is_not_copied(host: Host) -> None:
    streamed = torch.zeros(4)
    model = AtRest(Whole(), at_rest().on_device, {("text_encoder", "weight"): streamed})
    assert host.cache.park(A, model)
    assert found(host, A).tensors["text_encoder", "weight"] is streamed


def test_the_least_recently_used_leaves_the_host(host: Host) -> None:
    for asset in (A, B, C):
        assert host.cache.park(asset, at_rest())
    assert host.cache.park(D, at_rest(5))
    assert host.parked == ["c", "d"]


def test_what_is_wanted_next_stays(host: Host) -> None:
    for asset in (A, B, C):
        host.cache.park(asset, at_rest())
    host.cache.expect(A)
    assert host.cache.park(D, at_rest(4))
    assert host.parked == ["a", "c", "d"]


def test_what_can_never_fit_pushes_nothing_out(host: Host) -> None:
    host.cache.park(A, at_rest())
    assert not host.cache.park(B, at_rest(11))
    host.cache.expect(A)
    assert not host.cache.park(B, at_rest(8))
    assert host.parked == ["a"]


def test_a_copy_stays_and_serves_again(host: Host) -> None:
    host.cache.park(A, at_rest(value=7))
    before = found(host, A).tensors[KEY]
    host.cache.came_back(A)
    assert host.parked == [] and host.cache.find(A) is None
    assert host.cache.park(A, at_rest(value=7))
    assert found(host, A).tensors[KEY] is before


def test_what_needs_no_copy_needs_no_room(host: Host) -> None:
    short = [False]
    cache = HostCache(lambda: -1 if short[0] else 10, host.release, pin=False)
    cache.park(A, at_rest())
    cache.came_back(A)
    short[0] = True
    assert cache.park(A, at_rest())


def test_copies_of_what_is_on_the_device_go_first(host: Host) -> None:
    for asset in (A, B, C):
        host.cache.park(asset, at_rest())
    host.cache.came_back(B)
    assert host.cache.park(D, at_rest())
    assert host.parked == ["a", "c", "d"]
    assert host.cache.park(B, at_rest())  # of which there is no copy any more
    assert host.parked == ["c", "d", "b"]


def test_what_is_written_on_the_host_is_taken_as_it_is_then(host: Host) -> None:
    key = ("text_encoder", "weight")
    host.cache.park(A, AtRest(Whole(), at_rest().on_device, {key: torch.zeros(1)}))
    host.cache.came_back(A, living_here=("text_encoder",))
    host.cache.park(A, AtRest(Whole(), at_rest().on_device, {key: torch.ones(1)}))
    assert found(host, A).tensors[key].item() == 1


def test_unloading_takes_the_adapters_along(host: Host) -> None:
    host.cache.park(LORA_OF_A, at_rest())
    host.cache.park(A, at_rest())
    host.cache.park(B, at_rest())
    copies = [weakref.ref(found(host, asset).tensors[KEY]) for asset in (A, LORA_OF_A)]
    host.cache.drop(A)
    gc.collect()
    assert [copy() for copy in copies] == [None, None]
    assert host.parked == ["b"] and host.cache.find(LORA_OF_A) is None
    assert host.releases == 1
    host.cache.drop(A)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_what_cannot_be_pinned_is_dropped() -> None:
    cache = HostCache(lambda: 10, lambda: None, pin=True)
    assert not cache.park(A, at_rest())
    assert cache.names("model") == ()


def test_copies_are_laid_out_alike_and_apart() -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    joined = torch.randn(6, 4, dtype=torch.float64)
    tensors = {
        ("a", "image"): image,
        ("a", "rows"): joined[2:4],
        ("b", "half"): torch.randn(3, dtype=torch.float16),
        ("b", "scalar"): torch.tensor(5),
        ("b", "empty"): torch.empty(0),
    }
    for slab_bytes in (1, 600, 10**6):
        copies = copy_to_host(tensors, pin=False, slab_bytes=slab_bytes)
        assert copies.keys() == tensors.keys()
        for key, copy in copies.items():
            assert torch.equal(copy, tensors[key]) and copy.dtype == tensors[key].dtype
        assert copies["a", "image"].stride() == image.stride()
        spans = sorted((copy.data_ptr(), copy.nbytes) for copy in copies.values() if copy.nbytes)
        ends = [start + size for start, size in spans]
        assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))


class Levels:
    """A device of 7 bytes over the host; every asset takes 3."""

    def __init__(self) -> None:
        self.host = Host()
        self.on_device: set[Asset] = set()
        self.assets = Residency(self.free, self.release, park=self.host.cache.park)

    @property
    def loaded(self) -> list[str]:
        return list(self.assets.names("model"))

    def free(self) -> int:
        return 7 - 3 * len(self.on_device)

    def release(self) -> None:
        self.on_device = {asset for asset in self.on_device if asset in self.assets}

    def bring(self, asset: Asset, *in_use: Asset) -> bool:
        if asset in self.assets:
            self.assets.use(asset)
            return True
        self.host.cache.expect(asset)
        if not self.assets.make_room(3, in_use):
            return False
        self.assets.add(asset, at_rest())
        self.on_device.add(asset)
        self.host.cache.came_back(asset)
        return True


def test_two_levels_in_order_of_use() -> None:
    levels = Levels()
    for asset in (A, B, A, C):
        assert levels.bring(asset)
    assert levels.loaded == ["a", "c"]
    assert levels.host.parked == ["b"]
    assert levels.bring(B)
    assert levels.loaded == ["c", "b"]
    assert levels.host.parked == ["a"]
    for asset in (D, A, B, C):
        assert levels.bring(asset)
    # 10 bytes hold three
    assert levels.loaded == ["b", "c"]
    assert levels.host.parked == ["d", "a"]


def test_what_is_in_use_is_not_parked() -> None:
    levels = Levels()
    levels.bring(A)
    levels.bring(B)
    assert not levels.bring(C, A, B)
    assert levels.host.parked == []
    assert levels.bring(C, A)
    assert levels.loaded == ["a", "c"]
    assert levels.host.parked == ["b"]


def test_a_model_is_parked_with_its_adapters() -> None:
    levels = Levels()
    levels.bring(A)
    levels.bring(LORA_OF_A)
    assert levels.bring(B)
    assert levels.loaded == ["b"]
    assert levels.host.cache.find(A) is not None and levels.host.cache.find(LORA_OF_A) is not None
    assert levels.free() == 4


def test_what_is_dropped_for_good_is_not_parked() -> None:
    levels = Levels()
    levels.bring(A)
    levels.assets.drop(A)
    assert levels.host.parked == [] and A not in levels.assets
