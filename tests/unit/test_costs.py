"""What the engine learns about the duration of its steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experimance_controlnet.engine.costs import (
    FAILURE_STEPS,
    KNEE_TOLERANCE,
    MIN_OBSERVATIONS,
    StepCosts,
)
from experimance_controlnet.workload import unet_flops, vae_decode_flops


def learnt(steps_s: dict[int, float], size: int = 1024) -> StepCosts:
    costs = StepCosts()
    for rows, seconds in steps_s.items():
        observe(costs, size, rows, seconds)
    return costs


def observe(costs: StepCosts, size: int, rows: int, seconds: float) -> None:
    for _ in range(MIN_OBSERVATIONS):
        costs.observe(size, size, rows, seconds)


MEASURED = {1: 0.0235, 2: 0.0368, 4: 0.0692, 16: 0.2672}


def test_measured_points_are_returned_and_interpolated() -> None:
    costs = learnt(MEASURED)
    for rows, seconds in MEASURED.items():
        assert costs.step_s(1024, 1024, rows) == pytest.approx(seconds)
    assert costs.step_s(1024, 1024, 3) == pytest.approx(0.0530)
    assert costs.step_s(1024, 1024, 10) == pytest.approx(0.1682)


def test_outside_the_measured_widths_cost_is_proportional_to_rows() -> None:
    costs = learnt({2: 0.04, 4: 0.06})
    assert costs.step_s(1024, 1024, 1) == pytest.approx(0.02)
    assert costs.step_s(1024, 1024, 8) == pytest.approx(0.12)


def test_another_size_costs_its_share_of_flops() -> None:
    costs = learnt(MEASURED)
    observe(costs, 512, 2, 0.012)
    ratio = unet_flops(576, 576) / unet_flops(512, 512)
    assert costs.step_s(576, 576, 2) == pytest.approx(0.012 * ratio)  # 512 is the more similar
    ratio = unet_flops(1152, 1024) / unet_flops(1024, 1024)
    assert costs.step_s(1152, 1024, 4) == pytest.approx(0.0692 * ratio)


def test_before_any_measurement_cost_is_arithmetic() -> None:
    costs = StepCosts()
    one_s = costs.step_s(1024, 1024, 1)
    assert one_s > 0
    assert costs.step_s(1024, 1024, 6) == pytest.approx(6 * one_s)
    ratio = unet_flops(512, 512) / unet_flops(1024, 1024)
    assert costs.step_s(512, 512, 1) == pytest.approx(one_s * ratio)
    assert not costs.is_measured(1024, 1024)


def test_decoding_is_priced_by_flops() -> None:
    ratio = vae_decode_flops(1024, 1024) / unet_flops(1024, 1024)
    assert learnt(MEASURED).decode_s(1024, 1024) == pytest.approx(0.0235 * ratio)


def test_a_single_outlier_counts_for_nothing() -> None:
    costs = StepCosts()
    costs.observe(1024, 1024, 2, 30.0)  # kernels compiled
    assert not costs.is_measured(1024, 1024)
    for _ in range(MIN_OBSERVATIONS - 1):
        costs.observe(1024, 1024, 2, 0.04)
    assert costs.is_measured(1024, 1024)
    assert costs.step_s(1024, 1024, 2) == pytest.approx(0.04)


def test_a_device_that_slows_down_is_followed() -> None:
    costs = learnt({2: 0.04})
    assert costs.step_s(1024, 1024, 2) == pytest.approx(0.04)
    for _ in range(15):
        costs.observe(1024, 1024, 2, 0.06)
    assert costs.step_s(1024, 1024, 2) == pytest.approx(0.06)


def test_switches_are_measured_by_kind() -> None:
    costs = StepCosts()
    for seconds in (0.4, 9.0, 0.5):
        assert costs.switch_s("model") == 0
        costs.observe_switch("model", seconds)
    assert costs.switch_s("model") == 0.5
    assert costs.switch_s("adapters") == 0


def test_the_knee_is_the_smallest_width_near_the_best() -> None:
    costs = learnt({1: 0.020, 2: 0.030, 4: 0.0404, 8: 0.080, 16: 0.162})
    assert costs.knee_rows(1024, 1024, 16) == 4  # 10.1 ms a row against 10.0 at best
    assert costs.knee_rows(1024, 1024, 3) == 2
    assert costs.knee_rows(1024, 1024, 1) == 1


def test_beyond_the_widest_measured_a_curve_may_fall_further() -> None:
    costs = learnt({2: 0.030, 4: 0.040})
    assert costs.knee_rows(1024, 1024, 64) == 8
    assert costs.knee_rows(1024, 1024, 6) == 6
    observe(costs, 1024, 8, 0.081)
    assert costs.knee_rows(1024, 1024, 64) == 4


def test_an_unmeasured_size_starts_with_one_guided_request() -> None:
    costs = learnt(MEASURED)
    assert costs.knee_rows(512, 512, 8) == 2
    assert costs.knee_rows(512, 512, 1) == 1


@given(
    st.dictionaries(st.integers(1, 64), st.floats(0.001, 10.0), min_size=1),
    st.integers(1, 64),
)
def test_no_measured_width_is_much_better_than_the_knee(
    steps_s: dict[int, float], max_rows: int
) -> None:
    costs = learnt(steps_s)
    knee = costs.knee_rows(1024, 1024, max_rows)
    assert 1 <= knee <= max_rows
    if knee in steps_s:
        allowed = [seconds / rows for rows, seconds in steps_s.items() if rows <= max_rows]
        assert steps_s[knee] / knee <= min(allowed) * (1 + KNEE_TOLERANCE) * (1 + 1e-9)


def test_a_width_that_did_not_fit_is_tried_again_much_later() -> None:
    costs = StepCosts()
    costs.observe_failure(1024, 1024, 8)
    costs.observe_failure(1024, 1024, 4)
    costs.observe_failure(1024, 1024, 6)
    assert costs.fits(1024, 1024, 3) and not costs.fits(1024, 1024, 4)
    assert costs.fits(512, 512, 8)
    for _ in range(FAILURE_STEPS - 1):
        costs.observe(1024, 1024, 2, 0.03)
    assert not costs.fits(1024, 1024, 4)
    costs.observe(1024, 1024, 2, 0.03)
    assert costs.fits(1024, 1024, 8)
