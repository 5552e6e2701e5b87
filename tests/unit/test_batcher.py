"""Who runs next, and with whom."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experimance_controlnet.engine.batcher import AGEING, Batcher
from experimance_controlnet.engine.costs import MIN_OBSERVATIONS, StepCosts
from experimance_controlnet.engine.request import (
    Adapter,
    BatchKey,
    GenerationRequest,
    PhaseTimer,
    RequestState,
)
from experimance_controlnet.engine.schedulers import make_scheduler

SCHEDULER = make_scheduler("euler", {}, 6)  # takes no step here
DRONE = (Adapter("drone", 0.8),)


def state(
    cfg: float = 2.0, chunks: int = 1, steps: int = 6, accepted_s: float = 0.0, **changes: Any
) -> RequestState:
    fields = {"model": "lightning", "adapters": (), "width": 512, "height": 512, **changes}
    request = GenerationRequest(
        request_id="r",
        prompt="p",
        negative_prompt=None,
        steps=steps,
        cfg=cfg,
        seed=0,
        scheduler="euler",
        **fields,
    )
    key = BatchKey(token_chunks=chunks, **fields)
    return RequestState(request, key, PhaseTimer(accepted_s), SCHEDULER, torch.Generator())


def costs(steps_s: dict[int, float], model_switch_s: float = 0.0) -> StepCosts:
    """``steps_s``: seconds by rows, at 512x512."""
    learnt = StepCosts()
    for _ in range(MIN_OBSERVATIONS):
        for rows, seconds in steps_s.items():
            learnt.observe(512, 512, rows, seconds)
        learnt.observe_switch("model", model_switch_s)
        learnt.observe_switch("adapters", model_switch_s / 10)
    return learnt


FLAT = dict.fromkeys(range(1, 9), 0.01)
"""A device that eight rows do not fill."""
LINEAR = {rows: 0.01 * rows for rows in range(1, 9)}
"""A device that one row fills."""


def filled(*states: RequestState, max_rows: int = 8, learnt: StepCosts | None = None) -> Batcher:
    batcher = Batcher(max_rows, learnt or costs(FLAT))
    for one in states:
        batcher.add(one)
    return batcher


def test_nothing_waits() -> None:
    assert filled().next_batch() == []


def test_equal_keys_share_a_batch() -> None:
    states = [state(), state(cfg=7.0), state(cfg=1.0)]
    assert filled(*states).next_batch() == states


def test_other_weights_or_shapes_do_not() -> None:
    first = state()
    others = [
        state(model="base"),
        state(adapters=DRONE),
        state(width=768),
        state(height=768),
        state(chunks=2),
    ]
    assert filled(first, *others).next_batch() == [first]


def test_of_equals_the_first_chooses_and_its_kind_rides_along() -> None:
    a1, b, a2 = state(), state(model="base"), state()
    batcher = filled(a1, b, a2)
    assert batcher.next_batch() == [a1, a2]
    batcher.remove(a1)
    batcher.remove(a2)
    assert batcher.next_batch() == [b]


def test_rows_are_the_limit_not_requests() -> None:
    guided, plain = [state() for _ in range(3)], [state(cfg=1.0) for _ in range(3)]
    batch = filled(*plain, *guided, max_rows=7).next_batch()
    assert batch == [*plain, *guided[:2]]


def test_a_narrow_request_fills_the_gap_behind_a_wide_one() -> None:
    first, wide, narrow = state(steps=2), state(steps=3), state(cfg=1.0, steps=9)
    assert filled(first, wide, narrow, max_rows=3).next_batch() == [first, narrow]


def test_one_request_may_exceed_the_limit_and_the_knee() -> None:
    only = state()
    assert filled(only, max_rows=1).next_batch() == [only]
    assert filled(only, learnt=costs(LINEAR)).next_batch() == [only]


def test_a_batch_grows_to_the_knee_and_no_further() -> None:
    states = [state() for _ in range(4)]
    knee_at_3 = {1: 0.03, 2: 0.03, 3: 0.03, 4: 0.04, 8: 0.08}
    assert filled(*states, learnt=costs(knee_at_3)).next_batch() == states[:2]  # 4 rows reach it
    assert filled(*states, learnt=costs(LINEAR)).next_batch() == states[:1]


def test_wider_batches_are_tried_until_they_pay_no_more() -> None:
    states = [state() for _ in range(8)]
    learnt = StepCosts()
    batcher = filled(*states, max_rows=16, learnt=learnt)
    widths = []
    for _ in range(20):
        batch = batcher.next_batch()
        rows = sum(one.request.rows for one in batch)
        widths.append(rows)
        learnt.observe(512, 512, rows, max(0.04, 0.01 * rows))  # 4 rows fill this device
    assert widths == [2] * MIN_OBSERVATIONS + [4] * MIN_OBSERVATIONS + [8] * MIN_OBSERVATIONS + (
        [4] * (20 - 3 * MIN_OBSERVATIONS)
    )


def test_a_short_request_overtakes_at_the_next_step() -> None:
    long = state(steps=50, model="base")
    batcher = filled(long)
    assert batcher.next_batch() == [long]
    long.step = 1
    short = state(accepted_s=1.0)
    batcher.add(short)
    assert batcher.next_batch() == [short]
    batcher.remove(short)
    assert batcher.next_batch() == [long]


def test_what_is_nearly_done_is_not_overtaken() -> None:
    nearly = state(steps=50)
    nearly.step = 48
    assert filled(state(model="base"), nearly).next_batch() == [nearly]


def test_waiting_outweighs_work() -> None:
    long = state(steps=50, model="base", accepted_s=100.0)
    excess_s = 44 * 0.01  # more work than a short one
    before, after = (state(accepted_s=100.0 + share * excess_s / AGEING) for share in (0.9, 1.1))
    assert filled(long, before).next_batch() == [before]
    assert filled(long, after).next_batch() == [long]


def test_a_switch_that_costs_more_than_it_saves_waits() -> None:
    def race(model_switch_s: float) -> str:
        live = state(steps=20)
        batcher = filled(live, learnt=costs(FLAT, model_switch_s))
        batcher.next_batch()
        batcher.add(state(model="base"))  # 14 steps less, 0.14 s
        return batcher.next_batch()[0].request.model

    assert race(model_switch_s=0.05) == "base"
    assert race(model_switch_s=0.1) == "lightning"  # charged for both that wait


def test_alternating_arrivals_do_not_alternate_adapters() -> None:
    arrivals = [
        state(adapters=DRONE if number % 2 else (), accepted_s=0.1 * number) for number in range(30)
    ]
    batcher = filled(*arrivals, learnt=costs(LINEAR, model_switch_s=1.0))
    served = []
    while len(batcher):
        [chosen] = batcher.next_batch()
        chosen.step += 1
        if chosen.finished:
            served.append(chosen.key.adapters)
            batcher.remove(chosen)
    assert served == [()] * 15 + [DRONE] * 15


class Newcomers:
    """Short requests without end: another one whenever there is room for it."""

    def __init__(self, batcher: Batcher, kinds: list[tuple[int, str, float]], room: int) -> None:
        self._batcher = batcher
        self._kinds = kinds
        self._room = room
        self.accepted: list[RequestState] = []

    def arrive(self, now_s: float) -> None:
        while len(self._batcher) < self._room:
            steps, model, cfg = self._kinds[len(self.accepted) % len(self._kinds)]
            newcomer = state(steps=steps, model=model, cfg=cfg, accepted_s=now_s)
            self.accepted.append(newcomer)
            self._batcher.add(newcomer)


@settings(max_examples=50, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from(["a", "b"]), st.sampled_from([1.0, 2.0])),
        min_size=1,
        max_size=5,
    ),
    steps=st.integers(1, 50),
    room=st.integers(2, 6),
    full_rows=st.integers(1, 8),
    switch_s=st.floats(0.0, 0.5),
)
def test_nothing_starves(
    kinds: list[tuple[int, str, float]], steps: int, room: int, full_rows: int, switch_s: float
) -> None:
    """The bound of the module's docstring, under newcomers that never end."""
    steps_s = {rows: 0.01 * max(rows, full_rows) for rows in range(1, 9)}
    learnt = costs(steps_s, switch_s)
    batcher = Batcher(8, learnt)
    newcomers = Newcomers(batcher, kinds, room)
    waits = state(steps=steps, model="long", adapters=DRONE)
    batcher.add(waits)
    work_s = steps * learnt.step_s(512, 512, 2) + learnt.decode_s(512, 512)
    latest_s = (work_s + room * 1.1 * switch_s) / AGEING + 1e-6
    now_s, overtaken, model = 0.0, 0, None
    while not waits.finished:
        newcomers.arrive(now_s)
        batch = batcher.next_batch()
        now_s += steps_s[sum(one.request.rows for one in batch)]
        now_s += switch_s if batch[0].request.model != model else 0.0
        model = batch[0].request.model
        if waits not in batch:
            overtaken += 1
            assert any(one.timer.accepted_s <= latest_s for one in batch)
        for one in batch:
            one.step += 1
            if one.finished:
                batcher.remove(one)
    ahead = [one for one in newcomers.accepted if one.timer.accepted_s <= latest_s]
    assert overtaken <= sum(one.request.steps for one in ahead)
