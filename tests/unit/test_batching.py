"""The simulation of ``benchmarks/batching.py``, small: what it claims and that it repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.batching import RESULTS, Row, measure, serve
from benchmarks.policies import POLICIES
from benchmarks.simulation import CostTable, Device, traffic

PARKED = CostTable.read(RESULTS / "step_costs.json")
RESIDENT = replace(PARKED, switch_s={"adapters": PARKED.switch_s["adapters"], "model": 0.0})


def rows(table: CostTable, load: float | None, count: int = 300) -> dict[str, Row]:
    return {policy: measure(table, "", load, policy, count, [1, 2]) for policy in POLICIES}


@pytest.mark.parametrize("table", [PARKED, RESIDENT], ids=["parked", "resident"])
@pytest.mark.parametrize("load", [0.8, 0.95])
def test_ours_has_the_lowest_mean(table: CostTable, load: float) -> None:
    mean_s = {policy: row.all.mean for policy, row in rows(table, load).items()}
    assert mean_s["ours"] == min(mean_s.values())
    assert mean_s["ours"] < 0.95 * mean_s["fixed"]
    assert mean_s["fixed"] < mean_s["fcfs"] or table is RESIDENT


def test_switching_models_less_often_serves_more() -> None:
    served = {policy: row.images_per_s for policy, row in rows(PARKED, None, count=64).items()}
    assert served["ours"] > served["fixed"] > served["oldest"] > served["fcfs"]


def test_the_same_seed_gives_the_same_figures() -> None:
    assert rows(PARKED, 0.5, count=50) == rows(PARKED, 0.5, count=50)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everybody_in_full(policy: str) -> None:
    states = traffic(PARKED, 0.8, 100, seed=3)
    serve(Device(PARKED, seed=3), states, policy)
    for state in states:
        assert state.step == state.request.steps
        assert state.timer.decoded_s is not None
        # noise aside, no request ends sooner than it would alone
        assert state.timer.decoded_s - state.timer.accepted_s > 0.8 * PARKED.solo(state.request)


def test_load_is_the_share_of_time_that_solo_service_takes() -> None:
    states = traffic(PARKED, 0.8, 2000, seed=1)
    busy_s = sum(PARKED.solo(state.request) for state in states)
    assert busy_s / states[-1].timer.accepted_s == pytest.approx(0.8, rel=0.05)
