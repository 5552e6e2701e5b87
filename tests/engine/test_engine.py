"""The thread, its books and its faults, on a runner that only pretends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest

from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import (
    Asset,
    GenerationRequest,
    Progress,
    RequestState,
)
from experimance_controlnet.engine.runner import Stage
from experimance_controlnet.engine.tickets import Ticket
from experimance_controlnet.errors import (
    BadWeightsError,
    DeadlineExceededError,
    DeviceMemoryError,
    DrainingError,
    EngineDeadError,
    GenerationError,
    ModelBusyError,
    ModelFileError,
    NanOutputError,
    QueueFullError,
    RequestAbortedError,
)

WAIT_S = 20.0
StartEngine = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[StartEngine]:
    engines: list[Engine] = []

    def start(runner: FakeRunner, **options: Any) -> Engine:
        engine = Engine(runner, **{"queue_capacity": 16, "max_rows": 8, **options})
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.stop(timeout_s=1.0)


def request(name: str = "r", **changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "model": "lightning",
        "prompt": "p",
        "negative_prompt": None,
        "width": 64,
        "height": 64,
        "steps": 4,
        "cfg": 2.0,
        "seed": 1,
        "scheduler": "euler",
        "workload": 10.0,
    }
    return GenerationRequest(request_id=name, **{**fields, **changes})


def test_it_accepts_before_it_has_begun(start: StartEngine) -> None:
    begin = threading.Event()
    engine = start(FakeRunner(), on_start=begin.wait, watchdog_s=0.01)
    [ticket] = engine.submit([request()])
    loaded = engine.load("base")
    time.sleep(0.1)
    assert not ticket.future.done() and not loaded.done()
    assert engine.health().alive and not engine.health().hung
    begin.set()
    assert outcomes([ticket]) == [None]
    loaded.result(WAIT_S)


def test_an_engine_that_cannot_begin_dies(start: StartEngine) -> None:
    begin, died = threading.Event(), threading.Event()

    def fail() -> None:
        begin.wait(WAIT_S)
        raise ImportError("no such library")

    engine = start(FakeRunner(), on_start=fail, on_death=died.set)
    tickets = engine.submit([request()])
    begin.set()
    assert died.wait(WAIT_S)
    assert outcomes(tickets) == [EngineDeadError]
    assert not engine.health().alive


def outcomes(tickets: list[Ticket]) -> list[type[BaseException] | None]:
    """None for an image, else the class of the error."""
    errors = [ticket.future.exception(WAIT_S) for ticket in tickets]
    return [None if error is None else type(error) for error in errors]


def fail_on(operation: str, name: str, error: Exception, times: int = 10**9) -> Any:
    """A fault that strikes so often when that operation meets the named request."""
    left = [times]

    def fault(at: str, requests: list[GenerationRequest]) -> None:
        if at == operation and any(one.request_id == name for one in requests) and left[0]:
            left[0] -= 1
            raise error

    return fault


def test_images_and_their_times(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.01))
    tickets = engine.submit([request("a", seed=3), request("b", seed=4)])
    results = [ticket.future.result(WAIT_S) for ticket in tickets]
    assert [result.pixels[0, 0, 0] for result in results] == [4, 5]
    assert results[0].denoise_s >= 4 * 0.01
    assert results[0].queue_s >= 0
    assert engine.health().queue_depth == 0


def test_requests_share_batches_and_join_late(start: StartEngine) -> None:
    runner = FakeRunner(step_s=0.05)
    engine = start(runner)
    engine.load("lightning").result(WAIT_S)
    first = engine.submit([request("first", steps=10)])
    time.sleep(0.15)
    second = engine.submit([request("second", steps=2)])
    assert outcomes(first + second) == [None, None]
    assert ["first"] in runner.batches
    assert runner.batches.count(["first", "second"]) == 2


def test_a_short_request_overtakes_a_long_one(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.02))
    for model in ("lightning", "base"):
        engine.load(model).result(WAIT_S)
    [long] = engine.submit([request("long", model="base", steps=50)])
    time.sleep(0.1)
    [short] = engine.submit([request("short")])
    short.future.result(WAIT_S)
    assert not long.future.done()
    assert outcomes([long]) == [None]


def test_batches_widen_as_long_as_the_measured_cost_a_row_falls(start: StartEngine) -> None:
    runner = FakeRunner(step_s=0.01)  # however many rows: a device that is never full
    engine = start(runner, max_rows=8)
    engine.load("lightning").result(WAIT_S)
    tickets = engine.submit([request(str(number), steps=12) for number in range(8)])
    assert outcomes(tickets) == [None] * 8
    widths = [len(batch) for batch in runner.batches]
    assert widths[0] == 1
    assert max(widths) == 4  # MAX_BATCH_ROWS is 8, and guidance brings two rows


def test_progress_is_told_for_every_step(start: StartEngine) -> None:
    seen: list[Progress] = []
    [ticket] = start(FakeRunner()).submit([request(steps=5)], on_progress=seen.append)
    ticket.future.result(WAIT_S)
    assert seen == [Progress(step, 5) for step in range(1, 6)]


@pytest.mark.parametrize("operation", ["prepare", "predict", "advance", "decode"])
def test_only_the_culprit_of_a_batch_fails(start: StartEngine, operation: str) -> None:
    runner = FakeRunner(step_s=0.01, load_s=0.2, fault=fail_on(operation, "bad", ValueError("x")))
    engine = start(runner)
    tickets = engine.submit([request(name, cfg=1.0) for name in ("a", "bad", "b", "c")])
    assert outcomes(tickets) == [None, GenerationError, None, None]
    assert operation == "prepare" or ["a", "bad"] in runner.batches
    assert engine.health().alive
    assert outcomes(engine.submit([request("next")])) == [None]


def test_a_typed_error_is_passed_on(start: StartEngine) -> None:
    runner = FakeRunner(fault=fail_on("admit", "bad", BadWeightsError("no")))
    assert outcomes(start(runner).submit([request("bad"), request("good")])) == [
        BadWeightsError,
        None,
    ]


def test_out_of_memory_splits_the_batch(start: StartEngine) -> None:
    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "predict" and len(requests) > 1:
            raise MemoryError

    runner = FakeRunner(load_s=0.2, fault=fault)
    tickets = start(runner).submit([request("a", cfg=1.0), request("b", cfg=1.0)])
    assert outcomes(tickets) == [None, None]
    assert [ticket.future.result().notes for ticket in tickets] == [("batch_split",)] * 2
    # the width is remembered: it fails once, and never again
    assert runner.batches.count(["a", "b"]) == 1


def test_out_of_memory_of_one_alone(start: StartEngine) -> None:
    engine = start(FakeRunner(fault=fail_on("predict", "big", MemoryError())))
    assert outcomes(engine.submit([request("big")])) == [DeviceMemoryError]
    assert outcomes(engine.submit([request("small")])) == [None]


@pytest.mark.parametrize(("error", "releases"), [(ValueError(), 0), (MemoryError(), 1)])
def test_graphs_are_given_up_for_want_of_memory_alone(
    start: StartEngine, error: Exception, releases: int
) -> None:
    released: list[None] = []

    class Counting(FakeRunner):
        def release_memory(self) -> None:
            released.append(None)

    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "predict" and len(requests) > 1:
            raise error

    tickets = start(Counting(load_s=0.2, fault=fault)).submit(
        [request("a", cfg=1.0, steps=1), request("b", cfg=1.0, steps=1)]
    )
    assert outcomes(tickets) == [None, None]
    assert len(released) == releases


@pytest.mark.parametrize("operation", ["prepare", "predict", "decode", "result"])
def test_out_of_memory_is_tried_again_with_less(start: StartEngine, operation: str) -> None:
    fault = fail_on(operation, "big", MemoryError(), times=2)
    engine = start(FakeRunner(fault=fault, remedies=("memory_released", "offloaded", "more")))
    [big, small] = engine.submit([request("big"), request("small", width=128)])
    assert big.future.result(WAIT_S).notes == ("memory_released", "offloaded")
    assert small.future.result(WAIT_S).notes == ()


@pytest.mark.parametrize("operation", ["prepare", "predict", "decode", "result"])
def test_out_of_memory_whatever_is_done(start: StartEngine, operation: str) -> None:
    fault = fail_on(operation, "big", MemoryError())
    engine = start(FakeRunner(fault=fault, remedies=("memory_released", "offloaded")))
    assert outcomes(engine.submit([request("big")])) == [DeviceMemoryError]
    assert outcomes(engine.submit([request("small")])) == [None]
    assert engine.health().queue_depth == 0


def test_a_step_of_the_scheduler_is_never_repeated(start: StartEngine) -> None:
    fault = fail_on("advance", "big", MemoryError(), times=1)
    engine = start(FakeRunner(fault=fault, remedies=("memory_released",)))
    assert outcomes(engine.submit([request("big")])) == [DeviceMemoryError]


def test_a_remedy_that_fails_ends_the_request(start: StartEngine) -> None:
    class Helpless(FakeRunner):
        def relieve(self, state: RequestState, stage: Stage, in_use: Collection[Asset]) -> str:
            raise MemoryError("nothing left to pin")

    engine = start(Helpless(fault=fail_on("predict", "big", MemoryError())))
    assert outcomes(engine.submit([request("big")])) == [DeviceMemoryError]
    assert outcomes(engine.submit([request("small")])) == [None]


def test_a_load_without_room_waits_for_what_runs(start: StartEngine) -> None:
    events: list[str] = []

    def room(asset: Asset, in_use: Collection[Asset]) -> bool:
        return asset.name == "lightning" or Asset("model", "lightning") not in in_use

    def note(operation: str, requests: list[GenerationRequest]) -> None:
        if operation in ("load", "decode"):
            events.append(operation)

    runner = FakeRunner(step_s=0.05, fault=note, room=room)
    engine = start(runner)
    engine.load("lightning").result(WAIT_S)
    first = engine.submit([request("first")])
    while not runner.batches:
        time.sleep(0.005)
    other = engine.submit([request("other", model="base")])
    late = engine.submit([request("late")])  # it must not keep the load waiting
    assert outcomes([*first, *other, *late]) == [None] * 3
    assert events == ["load", "decode", "load", "decode", "decode"]
    assert runner.batches.index(["late"]) > runner.batches.index(["first"])
    assert not any({"first", "late"} <= set(batch) for batch in runner.batches)


def test_what_never_fits_is_tried_when_nothing_runs(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.02, room=lambda asset, in_use: False))
    tickets = engine.submit([request("a"), request("b", model="base"), request("c")])
    assert outcomes(tickets) == [None] * 3


def test_a_request_that_waits_for_room_expires(start: StartEngine) -> None:
    runner = FakeRunner(step_s=0.1, room=lambda asset, in_use: False)
    engine = start(runner)
    first = engine.submit([request("first", steps=8)])
    while not runner.batches:
        time.sleep(0.005)
    soon_s = time.monotonic() + 0.2
    late = engine.submit([request("late", model="base", deadline_s=soon_s)])
    held = engine.submit([request("held", deadline_s=soon_s)])
    assert outcomes([*late, *held]) == [DeadlineExceededError] * 2
    assert outcomes(first) == [None]


def test_a_lost_device_ends_the_engine(start: StartEngine) -> None:
    died = threading.Event()
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    runner = FakeRunner(load_s=0.2, fault=fail_on("predict", "bad", error))
    engine = start(runner, on_death=died.set)
    together = [request("a", cfg=1.0), request("bad", cfg=1.0)]
    tickets = engine.submit([*together, request("b", model="base")])
    assert outcomes(tickets) == [EngineDeadError] * 3
    assert died.wait(WAIT_S)
    assert not engine.health().alive
    with pytest.raises(EngineDeadError):
        engine.submit([request()])
    with pytest.raises(EngineDeadError):
        engine.load("base")


def test_queue_full_accepts_all_or_none(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.05), queue_capacity=3)
    accepted = engine.submit([request("a"), request("b")])
    with pytest.raises(QueueFullError) as refused:
        engine.submit([request("c"), request("d")])
    assert refused.value.retry_after_s >= 1
    assert engine.health().queue_depth == 2
    assert engine.health().queue_workload == 20.0
    accepted += engine.submit([request("e")])
    assert outcomes(accepted) == [None] * 3


def test_deadline_passes_in_the_queue(start: StartEngine) -> None:
    runner = FakeRunner(step_s=0.1)
    engine = start(runner, max_rows=2)
    engine.load("lightning").result(WAIT_S)
    tickets = engine.submit([request("first"), request("late", deadline_s=time.monotonic() + 0.15)])
    assert outcomes(tickets) == [None, DeadlineExceededError]
    assert not any("late" in batch for batch in runner.batches)


def test_deadline_passes_while_the_model_loads(start: StartEngine) -> None:
    engine = start(FakeRunner(load_s=1.0))
    [ticket] = engine.submit([request(deadline_s=time.monotonic() + 0.1)])
    submitted_s = time.monotonic()
    assert outcomes([ticket]) == [DeadlineExceededError]
    assert time.monotonic() - submitted_s < 0.9


def test_a_request_under_way_outlives_its_deadline(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.1))
    assert outcomes(engine.submit([request(deadline_s=time.monotonic() + 0.2)])) == [None]


def test_abort_frees_the_slot_within_a_step(start: StartEngine) -> None:
    runner = FakeRunner(step_s=0.05)
    engine = start(runner)
    [ticket] = engine.submit([request("gone", steps=50)])
    while not runner.batches:
        time.sleep(0.01)
    engine.abort(ticket)
    assert outcomes([ticket]) == [RequestAbortedError]
    assert len(runner.batches) < 10
    assert engine.health().queue_depth == 0


def test_abort_while_the_model_loads_and_after_the_end(start: StartEngine) -> None:
    engine = start(FakeRunner(load_s=0.3))
    [gone, stays] = engine.submit([request("gone"), request("stays")])
    engine.abort(gone)
    assert outcomes([gone, stays]) == [RequestAbortedError, None]
    engine.abort(stays)
    assert outcomes(engine.submit([request("next")])) == [None]


def test_loaded_models_go_on_while_another_loads(start: StartEngine) -> None:
    engine = start(FakeRunner(load_s=0.5))
    engine.load("lightning").result(WAIT_S)
    [waits] = engine.submit([request("other", model="base")])
    [goes] = engine.submit([request("same")])
    goes.future.result(WAIT_S)
    assert not waits.future.done()
    assert engine.health().models_loading == ("base",)
    assert outcomes([waits]) == [None]
    assert set(engine.health().models_loaded) == {"lightning", "base"}


def test_loaded_models_go_on_while_another_comes_back(start: StartEngine) -> None:
    engine = start(FakeRunner(load_s=0.5, parked=["base"]))
    engine.load("lightning").result(WAIT_S)
    assert engine.health().models_parked == ("base",)
    [waits] = engine.submit([request("other", model="base")])
    [late] = engine.submit([request("late", model="base", deadline_s=0.0)])
    [after] = engine.submit([request("after", model="hyper")])
    [goes] = engine.submit([request("same")])
    goes.future.result(WAIT_S)
    assert not waits.future.done()
    assert outcomes([late]) == [DeadlineExceededError]
    begun, waiting = engine.health().loading
    assert (begun.kind, begun.name, begun.source) == ("model", "base", "host")
    assert begun.seconds is not None and 0 <= begun.seconds < WAIT_S
    assert begun.share == 0.5
    assert (waiting.name, waiting.source) == ("hyper", "disk")
    assert waiting.seconds is None and waiting.share is None
    assert outcomes([waits, after]) == [None, None]
    assert engine.health().models_parked == () and engine.health().loading == ()
    counts = {key: total.count for key, total in engine.model_loads().items()}
    assert counts == {("lightning", "disk"): 1, ("base", "host"): 1, ("hyper", "disk"): 1}


def test_a_parked_model_is_unloaded(start: StartEngine) -> None:
    engine = start(FakeRunner(parked=["base"]))
    engine.unload("base").result(WAIT_S)
    assert engine.health().models_parked == ()


def test_a_model_that_cannot_be_loaded(start: StartEngine) -> None:
    failures = [BadWeightsError("cut short")]

    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "load" and failures:
            raise failures.pop()

    engine = start(FakeRunner(load_s=0.1, fault=fault))
    assert outcomes(engine.submit([request("a"), request("b")])) == [BadWeightsError] * 2
    assert outcomes(engine.submit([request("again")])) == [None]


def test_a_model_there_is_no_room_for(start: StartEngine) -> None:
    """Whoever waits for it fails; a request under way goes on."""
    left = [0, 1]  # the first model finds room

    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "make_room" and left.pop():
            raise ModelFileError("gone")

    engine = start(FakeRunner(step_s=0.05, fault=fault))
    left.reverse()
    running = engine.submit([request(steps=10)])
    refused = engine.submit([request(model="base")])
    assert outcomes(running + refused) == [None, ModelFileError]
    assert engine.health().alive


class Panic(BaseException):
    """What a native library raises when it gives up."""


@pytest.mark.parametrize("operation", ["load", "predict"])
def test_a_panic_ends_the_engine_at_once(start: StartEngine, operation: str) -> None:
    def fault(at: str, requests: list[GenerationRequest]) -> None:
        if at == operation:
            raise Panic

    engine = start(FakeRunner(fault=fault))
    assert outcomes(engine.submit([request()])) == [EngineDeadError]
    assert not engine.health().alive


def test_the_last_error_tells_nothing_of_this_machine(start: StartEngine) -> None:
    engine = start(FakeRunner(fault=fail_on("predict", "bad", OSError("/secret/path is gone"))))
    assert outcomes(engine.submit([request("bad")])) == [GenerationError]
    assert "OSError" in str(engine.health().last_error)
    assert "secret" not in str(engine.health().last_error)


def test_a_failure_holds_no_frames(start: StartEngine) -> None:
    """They would keep the tensors of the failed request alive for as long as the error."""
    engine = start(FakeRunner(fault=fail_on("decode", "bad", NanOutputError("black"))))
    [ticket] = engine.submit([request("bad")])
    error = ticket.future.exception(WAIT_S)
    assert isinstance(error, NanOutputError)
    assert error.__traceback__ is None


def test_unload_while_it_loads(start: StartEngine) -> None:
    engine = start(FakeRunner(load_s=0.3))
    loading = engine.load("lightning")
    assert isinstance(engine.unload("lightning").exception(WAIT_S), ModelBusyError)
    loading.result(WAIT_S)


def test_load_and_unload(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.05))
    engine.load("lightning").result(WAIT_S)
    engine.load("lightning").result(WAIT_S)
    assert engine.health().models_loaded == ("lightning",)
    tickets = engine.submit([request()])
    assert isinstance(engine.unload("lightning").exception(WAIT_S), ModelBusyError)
    assert outcomes(tickets) == [None]
    engine.unload("lightning").result(WAIT_S)
    assert engine.health().models_loaded == ()
    engine.unload("lightning").result(WAIT_S)


def test_stop_finishes_what_was_accepted(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.02))
    tickets = engine.submit([request(str(number), cfg=1.0) for number in range(6)])
    assert engine.stop(timeout_s=WAIT_S)
    assert outcomes(tickets) == [None] * 6
    with pytest.raises(DrainingError):
        engine.submit([request()])


def test_stop_does_not_wait_for_ever(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=0.2, load_s=5.0))
    tickets = engine.submit([request(steps=50)])
    loading = engine.load("base")
    assert not engine.stop(timeout_s=0.3)
    assert outcomes(tickets) == [DrainingError]
    assert isinstance(loading.exception(WAIT_S), DrainingError)


def test_the_watchdog_sees_a_hang(start: StartEngine) -> None:
    engine = start(FakeRunner(step_s=1.0), watchdog_s=0.2)
    tickets = engine.submit([request(steps=1)])
    time.sleep(0.6)
    assert engine.health().hung
    assert engine.health().alive
    assert outcomes(tickets) == [None]
    assert not engine.health().hung


def test_every_ticket_ends_exactly_once(start: StartEngine) -> None:
    """Submitted, failed and aborted at random from several threads."""
    engine = start(
        FakeRunner(step_s=0.001, fault=fail_on("predict", "bad", ValueError("x"))),
        queue_capacity=1000,
    )
    tickets: list[Ticket] = []

    def client(number: int) -> None:
        for index in range(40):
            name = "bad" if index % 7 == 0 else "good"
            model = ("lightning", "base")[index % 2]
            [ticket] = engine.submit([request(name, model=model, steps=1 + index % 3)])
            tickets.append(ticket)
            if index % 5 == number % 5:
                engine.abort(ticket)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    ended = outcomes(tickets)
    assert len(ended) == 160
    assert set(ended) <= {None, GenerationError, RequestAbortedError}
    assert {None, GenerationError} <= set(ended)
    assert engine.health().queue_depth == 0


@pytest.mark.parametrize(("text", "survives"), [("out of memory", True), ("cuda error", False)])
def test_a_warm_up_that_fails_costs_no_request(
    start: StartEngine, text: str, survives: bool
) -> None:
    tried, died = threading.Event(), threading.Event()

    def fault(at: str, requests: list[GenerationRequest]) -> None:
        if at == "warm_up":
            tried.set()
            raise RuntimeError(text)

    engine = start(FakeRunner(fault=fault), on_death=died.set)
    assert tried.wait(WAIT_S)
    if survives:
        assert outcomes(engine.submit([request()])) == [None]
    assert died.wait(0.2 if survives else WAIT_S) is not survives
