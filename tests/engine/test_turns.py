"""Assets that do not fit into memory together, on a runner that only pretends to have any."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

import pytest

from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import (
    Adapter,
    Asset,
    Control,
    GenerationRequest,
    RequestState,
)
from experimance_controlnet.engine.residency import Residency
from experimance_controlnet.engine.runner import Stage
from experimance_controlnet.errors import (
    BadWeightsError,
    DeadlineExceededError,
    ModelBusyError,
    RequestAbortedError,
)
from tests.engine.conftest import DEPTH, make_request
from tests.engine.test_engine import WAIT_S, outcomes

SIZES = {"model": 6, "controlnet": 3, "lora": 1}


class Weights:
    """Takes memory for as long as anybody holds it."""


class Cramped(FakeRunner):
    """``capacity`` for assets of :data:`SIZES`; ``gates`` hold up the reading of an asset."""

    def __init__(self, capacity: int, **options: Any) -> None:
        super().__init__(**options)
        self._capacity = capacity
        self._assets = Residency(self.free, lambda: None, self._forget)
        self.gates: dict[Asset, threading.Event] = {}
        self.spoilt: set[Asset] = set()
        """Cannot be read to the end."""
        self.read: list[Asset] = []
        self._sizes: weakref.WeakKeyDictionary[Weights, int] = weakref.WeakKeyDictionary()

    @property
    def loaded_models(self) -> tuple[str, ...]:
        return self._assets.names("model")

    def missing(self, request: GenerationRequest) -> Asset | None:
        return next((asset for asset in request.assets if not self.has(asset)), None)

    def has(self, asset: Asset) -> bool:
        return asset in self._assets

    def make_room(self, asset: Asset, in_use: Collection[Asset]) -> bool:
        return self._assets.make_room(SIZES[asset.kind], in_use)

    def load(self, asset: Asset) -> Any:
        self.read.append(asset)
        if asset in self.gates:
            assert self.gates[asset].wait(WAIT_S)
        if asset.model is not None:
            self._assets.peek(Asset("model", asset.model))
        super().load(asset)
        weights = Weights()
        self._sizes[weights] = SIZES[asset.kind]
        if asset in self.spoilt:
            _complain()
        return weights

    def install(self, asset: Asset, loaded: Any) -> None:
        self._assets.add(asset, loaded)

    def unload(self, model: str) -> None:
        self._assets.drop(Asset("model", model))

    def prepare(self, state: RequestState) -> None:
        for asset in state.request.assets:
            self._assets.use(asset)
        super().prepare(state)

    def relieve(self, state: RequestState, stage: Stage, in_use: Collection[Asset]) -> str | None:
        if "memory_released" in state.notes:
            return None
        self._assets.drop_idle(in_use)
        return "memory_released"

    def free(self) -> int:
        return self._capacity - sum(self._sizes.values())

    def _forget(self, asset: Asset, thing: Any) -> None:
        if asset.model is not None:
            self._assets.peek(Asset("model", asset.model))


def _complain() -> NoReturn:
    try:
        raise ValueError("a tensor is cut short")
    except ValueError as error:
        raise BadWeightsError("cut short") from error


StartEngine = Callable[[Cramped], Engine]


@pytest.fixture
def start() -> Iterator[StartEngine]:
    engines: list[Engine] = []

    def start(runner: Cramped) -> Engine:
        engines.append(Engine(runner, queue_capacity=32, max_rows=8))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop(timeout_s=1.0)


def request(name: str, model: str, **changes: Any) -> GenerationRequest:
    return make_request(request_id=name, model=model, width=64, height=64, **changes)


def control(name: str) -> Control:
    return Control(name, DEPTH.depth, 1.0)


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


L_OF_A = Asset("lora", "l", "a")
LORA = (Adapter("l", 1.0),)


def test_what_a_request_needs_comes_together(start: StartEngine) -> None:
    """Neither keeps pushing out what the other has loaded already."""
    runner = Cramped(10, load_s=0.01)
    engine = start(runner)
    tickets = engine.submit(
        [
            request(str(number), "ab"[number % 2], control=control("ab"[number % 2]), adapters=LORA)
            for number in range(6)
        ]
    )
    assert outcomes(tickets) == [None] * 6
    assert len(runner.read) == 6  # the model, the ControlNet and the LoRA of each


def test_what_was_just_loaded_can_make_room(start: StartEngine) -> None:
    runner = Cramped(12, step_s=0.02)
    engine = start(runner)
    gate = runner.gates[Asset("model", "b")] = threading.Event()
    [under_way] = engine.submit([request("a", "a", steps=100)])
    until(lambda: runner.batches)
    preloads = [engine.load("b"), engine.load("c")]
    gate.set()
    for preload in preloads:
        preload.result(WAIT_S)
    assert not under_way.future.done()
    assert set(engine.health().models_loaded) == {"a", "c"}


def test_nothing_is_left_of_what_could_not_be_read(start: StartEngine) -> None:
    """Neither frames nor the garbage collector are waited for."""
    runner = Cramped(6)
    runner.spoilt.add(Asset("model", "a"))
    engine = start(runner)
    gc.disable()
    try:
        assert isinstance(engine.load("a").exception(WAIT_S), BadWeightsError)
        until(lambda: runner.free() == 6)
    finally:
        gc.enable()


def test_a_lora_whose_model_had_to_leave(start: StartEngine) -> None:
    runner = Cramped(8)
    engine = start(runner)
    engine.load("a").result(WAIT_S)
    first = Asset("lora", "first", "a")
    gate = runner.gates[first] = threading.Event()
    [gone] = engine.submit([request("gone", "a", adapters=(Adapter("first", 1.0),))])
    until(lambda: runner.read[-1] == first)
    tickets = engine.submit([request("b", "b"), request("a", "a", adapters=LORA)])
    engine.abort(gone)
    assert outcomes([gone]) == [RequestAbortedError]
    gate.set()
    assert outcomes(tickets) == [None, None]
    assert runner.read[2:] == [Asset("model", "b"), Asset("model", "a"), L_OF_A]


def test_a_model_stays_while_a_lora_is_read_against_it(start: StartEngine) -> None:
    faults = [MemoryError()]

    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "decode" and faults:
            raise faults.pop()

    runner = Cramped(20, step_s=0.05, fault=fault)
    engine = start(runner)
    for model in "ab":
        engine.load(model).result(WAIT_S)
    gate = runner.gates[L_OF_A] = threading.Event()
    [under_way] = engine.submit([request("b", "b")])
    [gone] = engine.submit([request("a", "a", adapters=LORA)])
    until(lambda: runner.read[-1] == L_OF_A)
    engine.abort(gone)
    assert isinstance(engine.unload("a").exception(WAIT_S), ModelBusyError)
    assert under_way.future.result(WAIT_S).notes == ("memory_released",)
    gate.set()
    until(lambda: runner.has(L_OF_A))
    assert set(engine.health().models_loaded) == {"a", "b"}
    engine.unload("a").result(WAIT_S)
    assert outcomes([gone]) == [RequestAbortedError]
    assert not runner.has(L_OF_A)


def test_who_waits_behind_a_load_goes_on_whoever_wakes_it(start: StartEngine) -> None:
    """The load finds room before everything under way has ended: something else was asked for."""
    runner = Cramped(12, step_s=0.02)
    engine = start(runner)
    for model in "ab":
        engine.load(model).result(WAIT_S)
    [short, long] = engine.submit([request("short", "a", steps=4), request("long", "b", steps=90)])
    until(lambda: len(runner.batches) > 1)
    [blocked] = engine.submit([request("blocked", "c")])
    [behind] = engine.submit([request("behind", "b", steps=1)])
    assert outcomes([short]) == [None]
    engine.load("c").result(WAIT_S)
    assert outcomes([behind, blocked]) == [None, None]
    assert not long.future.done()
    assert outcomes([long]) == [None]
    assert engine.health().queue_depth == 0


@pytest.mark.parametrize("how", ["aborted", "expired"])
def test_what_nobody_waits_for_any_more_is_not_loaded(start: StartEngine, how: str) -> None:
    runner = Cramped(6, step_s=0.05)
    engine = start(runner)
    engine.load("a").result(WAIT_S)
    [long] = engine.submit([request("long", "a", steps=20)])
    until(lambda: runner.batches)
    deadline_s = time.monotonic() + 0.1 if how == "expired" else None
    [blocked] = engine.submit([request("blocked", "b", deadline_s=deadline_s)])
    [behind] = engine.submit([request("behind", "a", steps=1)])
    if how == "aborted":
        engine.abort(blocked)
    expected = {"aborted": RequestAbortedError, "expired": DeadlineExceededError}
    assert outcomes([blocked, behind]) == [expected[how], None]
    assert not long.future.done()
    assert outcomes([long]) == [None]
    assert engine.health().models_loading == ()
    assert runner.read == [Asset("model", "a")]
