"""Which moments of the engine's beat become measurements."""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.engine.costs import MIN_OBSERVATIONS, StepCosts
from experimance_controlnet.engine.meter import LiveWeights, StepMeter
from experimance_controlnet.engine.request import (
    Adapter,
    BatchKey,
    GenerationRequest,
    PhaseTimer,
    RequestState,
)
from experimance_controlnet.engine.schedulers import make_scheduler

SCHEDULER = make_scheduler("euler", {}, 6)  # takes no step here
FUTURE = (Adapter("future", 1.0),)


def state(
    model: str = "lightning", adapters: tuple[Adapter, ...] = (), steps: int = 50, step: int = 1
) -> RequestState:
    request = GenerationRequest(
        request_id="r",
        model=model,
        prompt="p",
        negative_prompt=None,
        width=512,
        height=512,
        steps=steps,
        cfg=2.0,
        seed=0,
        scheduler="euler",
        adapters=adapters,
    )
    key = BatchKey(model, adapters, 512, 512, 1)
    return RequestState(request, key, PhaseTimer(0.0), SCHEDULER, torch.Generator(), step=step)


class Engine:
    """A beat by hand, on a clock by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.costs = StepCosts()
        self._meter = StepMeter(self.costs, lambda: self.now_s)

    def step(self, *states: RequestState, predict_s: float, rest_s: float = 0.0) -> None:
        """``rest_s``: what the engine does with the predictions."""
        self._meter.begin(states)
        self.now_s += predict_s
        self._meter.end()
        self.now_s += rest_s
        for one in states:
            one.step += 1

    def fail(self, *states: RequestState) -> None:
        self._meter.begin(states)
        self.now_s += 100.0

    def steps(self, *states: RequestState, count: int = MIN_OBSERVATIONS + 1) -> None:
        """Undisturbed ones of 50 ms."""
        for _ in range(count):
            self.step(*states, predict_s=0.04, rest_s=0.01)

    @property
    def is_measured(self) -> bool:
        return self.costs.is_measured(512, 512)

    def step_s(self, rows: int = 2) -> float:
        return self.costs.step_s(512, 512, rows)


def test_a_step_lasts_from_end_to_end() -> None:
    engine = Engine()
    engine.steps(state())
    assert engine.step_s() == pytest.approx(0.05)


def test_wherever_in_the_beat_the_host_waits_for_the_device() -> None:
    engine, one = Engine(), state()
    for _ in range(MIN_OBSERVATIONS + 1):
        engine.step(one, predict_s=0.001, rest_s=0.049)
    assert engine.step_s() == pytest.approx(0.05)


def test_rows_are_those_of_all_requests() -> None:
    engine = Engine()
    engine.steps(state(), state())
    assert engine.step_s(rows=4) == pytest.approx(0.05)


def test_steps_beside_a_preparation_are_left_out() -> None:
    engine = Engine()
    for _ in range(10):
        engine.step(state(step=0), predict_s=0.04, rest_s=3.0)
    assert not engine.is_measured


def test_steps_behind_a_decode_are_left_out() -> None:
    engine = Engine()
    for _ in range(10):
        engine.step(state(steps=7, step=6), predict_s=0.04, rest_s=3.0)
    assert not engine.is_measured


def test_steps_of_another_width_or_kind_than_the_one_before_are_left_out() -> None:
    engine, one, two = Engine(), state(), state()
    for _ in range(10):
        engine.step(one, predict_s=0.04)
        engine.step(one, two, predict_s=0.05)
    assert not engine.is_measured


def test_a_failed_evaluation_is_not_measured_nor_its_successor() -> None:
    engine, one = Engine(), state()
    for _ in range(10):
        engine.step(one, predict_s=0.04)
        engine.fail(one)
    assert not engine.is_measured
    engine.steps(one)
    assert engine.step_s() == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("other", "kind"), [(state(adapters=FUTURE), "adapters"), (state(model="base"), "model")]
)
def test_a_switch_is_what_a_step_took_beyond_itself(other: RequestState, kind: str) -> None:
    engine, one = Engine(), state()
    engine.steps(one)
    for _ in range(MIN_OBSERVATIONS):
        engine.step(one, predict_s=0.35)
        engine.step(other, predict_s=0.35)
    switches_s = {name: engine.costs.switch_s(name) for name in ("adapters", "model")}
    assert switches_s.pop(kind) == pytest.approx(0.3)
    assert list(switches_s.values()) == [0]


def test_a_switch_is_never_negative() -> None:
    engine, one, other = Engine(), state(), state(model="base")
    engine.steps(one)
    for _ in range(MIN_OBSERVATIONS):
        engine.step(one, predict_s=0.001)
        engine.step(other, predict_s=0.001)
    assert engine.costs.switch_s("model") == 0


def test_no_switch_is_charged_while_the_step_itself_is_unknown() -> None:
    engine, one, other = Engine(), state(), state(model="base")
    for _ in range(10):
        engine.step(one, predict_s=30.0)  # kernels compiled
        engine.step(other, predict_s=30.0)
    assert engine.costs.switch_s("model") == 0


def test_each_model_keeps_its_adapters() -> None:
    live = LiveWeights()
    plain, era, base = state().key, state(adapters=FUTURE).key, state(model="base").key
    assert live.switches_to(era) == ("adapters", "model")
    live.run(era)
    assert live.switches_to(era) == ()
    assert live.switches_to(plain) == ("adapters",)
    live.run(base)
    assert live.switches_to(era) == ("model",)
    assert live.switches_to(plain) == ("adapters", "model")
