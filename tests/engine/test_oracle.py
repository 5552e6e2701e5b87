"""The same request gives the picture that diffusers' own pipeline gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from experimance_controlnet.engine.schedulers import SCHEDULER_NAMES
from experimance_controlnet.engine.sdxl import SdxlRunner
from tests.engine.conftest import DEPTH, TWO_ADAPTERS, draw_one, loaded, make_request
from tests.engine.oracle import Oracle, max_difference

MAX_DIFFERENCE = 2


def check(runner: SdxlRunner, oracle: Oracle, **changes: Any) -> None:
    expected = oracle(make_request(**changes))
    assert expected.std() > 5, "the reference picture is empty: the comparison would prove nothing"
    assert max_difference(draw_one(runner, **changes), expected) <= MAX_DIFFERENCE


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("control", [None, DEPTH], ids=["text", "depth"])
def test_scheduler(
    runner: SdxlRunner, oracle: Oracle, scheduler: str, cfg: float, control: Any
) -> None:
    check(runner, oracle, scheduler=scheduler, cfg=cfg, control=control)


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
def test_adapters(runner: SdxlRunner, oracle: Oracle, scheduler: str) -> None:
    check(runner, oracle, scheduler=scheduler, control=DEPTH, adapters=TWO_ADAPTERS)


@pytest.mark.parametrize("negative_prompt", ["", "fog, snow"])
def test_negative_prompt(runner: SdxlRunner, oracle: Oracle, negative_prompt: str) -> None:
    check(runner, oracle, negative_prompt=negative_prompt, cfg=6.0)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.3, 0.8), (0.5, 1.0)])
def test_control_range(runner: SdxlRunner, oracle: Oracle, start: float, end: float) -> None:
    check(runner, oracle, control=dataclasses.replace(DEPTH, start=start, end=end))


@pytest.mark.parametrize("model", ["hyper", "base"])
def test_other_models(runner: SdxlRunner, oracle: Oracle, model: str) -> None:
    loaded(runner, model)
    for scheduler in ("euler", "dpm_sde"):
        check(runner, oracle, model=model, control=DEPTH, scheduler=scheduler)


def test_other_shape(runner: SdxlRunner, oracle: Oracle) -> None:
    check(runner, oracle, width=384, height=256)
