"""What stays in memory, against a memory that is counted by hand."""

from __future__ import annotations

import threading
import time
import weakref

from experimance_controlnet.engine.request import Asset
from experimance_controlnet.engine.residency import Residency


class Memory:
    """10 bytes; each asset takes what it was added with, and gives it back when it is released."""

    def __init__(self) -> None:
        self.taken: dict[Asset, int] = {}
        self.releases = 0
        self.forgotten: list[Asset] = []
        self.assets = Residency(self.free, self.release, self.forget)

    def free(self) -> int:
        return 10 - sum(self.taken.values())

    def release(self) -> None:
        self.releases += 1
        self.taken = {asset: size for asset, size in self.taken.items() if asset in self.assets}

    def forget(self, asset: Asset, thing: str) -> None:
        assert thing == asset.name.upper()
        self.forgotten.append(asset)

    def fill(self, *assets: Asset) -> None:
        for asset in assets:
            self.taken[asset] = 3
            self.assets.add(asset, asset.name.upper())


A, B, C = Asset("model", "a"), Asset("model", "b"), Asset("controlnet", "c")
LORA_OF_A = Asset("lora", "l", "a")


def test_what_fits_stays() -> None:
    memory = Memory()
    memory.fill(A, B)
    assert memory.assets.make_room(4, in_use=())
    assert memory.assets.names("model") == ("a", "b")
    assert memory.releases == 0


def test_the_least_recently_used_leaves() -> None:
    memory = Memory()
    memory.fill(A, B, C)
    assert memory.assets.use(A) == "A"
    assert memory.assets.peek(B) == "B"
    assert memory.assets.make_room(4, in_use=())
    assert memory.assets.names("model") == ("a",)
    assert C in memory.assets
    assert memory.forgotten == [B]


def test_what_is_in_use_stays() -> None:
    memory = Memory()
    memory.fill(A, B, C)
    assert not memory.assets.make_room(10, in_use={A, C})
    assert A in memory.assets and C in memory.assets and B not in memory.assets


def test_a_model_takes_its_adapters_along() -> None:
    memory = Memory()
    memory.fill(A, LORA_OF_A, C)
    memory.assets.drop(A)
    assert LORA_OF_A not in memory.assets and C in memory.assets
    assert memory.assets.names("lora") == ()
    assert memory.free() == 7


def test_an_adapter_leaves_alone() -> None:
    memory = Memory()
    memory.fill(LORA_OF_A, A)
    assert memory.assets.make_room(7, in_use={A})
    assert A in memory.assets and LORA_OF_A not in memory.assets
    assert memory.forgotten == [LORA_OF_A]


def test_everything_idle_leaves() -> None:
    memory = Memory()
    memory.fill(A, LORA_OF_A, B)
    memory.assets.drop_idle(in_use={B})
    assert memory.assets.names("model") == ("b",)
    assert LORA_OF_A not in memory.assets


class Weights:
    """Something that takes memory for as long as it lives."""


def test_what_is_dropped_is_gone_before_its_memory_is_released() -> None:
    living: list[int] = []
    weights: weakref.WeakSet[Weights] = weakref.WeakSet()
    assets = Residency(lambda: 3 - len(weights), lambda: living.append(len(weights)))
    for asset in (A, LORA_OF_A, B):
        thing = Weights()
        weights.add(thing)
        assets.add(asset, thing)
    del thing
    assert assets.make_room(2, in_use=())
    assert living == [1] and assets.names("model") == ("b",)
    assets.drop_idle(in_use=())
    assert living == [1, 0]


def test_others_may_read_at_any_time() -> None:
    memory = Memory()
    models = [Asset("model", str(number)) for number in range(12)]
    memory.fill(*models)
    names = {asset.name for asset in models}
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            for asset in models:
                memory.assets.use(asset)

    user = threading.Thread(target=use)
    user.start()
    try:
        until_s = time.monotonic() + 1.0
        while time.monotonic() < until_s:
            assert set(memory.assets.names("model")) == names
    finally:
        done.set()
        user.join()
