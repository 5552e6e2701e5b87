"""What a request's fields do to the picture, and what they must not do to other pictures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.request import Adapter
from experimance_controlnet.engine.schedulers import SCHEDULER_NAMES
from experimance_controlnet.engine.sdxl import SdxlRunner
from tests.engine.conftest import (
    DEPTH,
    DRONE,
    TWO_ADAPTERS,
    admitted,
    draw,
    draw_one,
    hills,
    loaded,
    make_request,
    step,
)
from tests.engine.oracle import all_equal, max_difference, mean_difference

LONG_PROMPT = "a river winds through dense forest, small fields and villages beside it, " * 12


def test_same_request_same_bytes(runner: SdxlRunner) -> None:
    for scheduler in ("euler", "dpm_sde"):
        images = [draw_one(runner, scheduler=scheduler, control=DEPTH) for _ in range(2)]
        assert all_equal(images)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"prompt": "desert with dunes at noon"},
        {"negative_prompt": "trees"},
        {"cfg": 6.0},
        {"steps": 6},
        {"scheduler": "euler_a"},
        {"use_karras_sigmas": True},
        {"control": None},
        {"control": dataclasses.replace(DEPTH, depth=hills(1))},
        {"control": dataclasses.replace(DEPTH, depth=1 - DEPTH.depth)},
        {"control": dataclasses.replace(DEPTH, strength=0.2)},
        {"control": dataclasses.replace(DEPTH, end=0.5)},
        {"adapters": DRONE},
        {"adapters": (Adapter("drone", 0.4),)},
        {"prompt": "aerial view of a (river:1.6) in a forest at sunset"},
        {"prompt": "aerial view of a river in a (forest:0.3) at sunset"},
        {"prompt": make_request().prompt + ", " + LONG_PROMPT},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_changes_the_picture(runner: SdxlRunner, changes: dict[str, Any]) -> None:
    defaults = {"control": DEPTH}
    if "adapters" in changes:
        defaults["adapters"] = TWO_ADAPTERS  # type: ignore[assignment]
    plain = draw_one(runner, **defaults)
    changed = draw_one(runner, **{**defaults, **changes})
    assert mean_difference(plain, changed) > 0.5


def test_end_of_a_long_prompt_counts(runner: SdxlRunner) -> None:
    summer, winter = (draw_one(runner, prompt=LONG_PROMPT + end) for end in ("summer", "snow"))
    assert mean_difference(summer, winter) > 0.1


def test_control_of_strength_zero_is_none(runner: SdxlRunner) -> None:
    silent = dataclasses.replace(DEPTH, strength=0.0)
    assert all_equal([draw_one(runner, control=silent), draw_one(runner, control=None)])


def test_depth_map_of_another_size_is_resized(runner: SdxlRunner) -> None:
    small = dataclasses.replace(DEPTH, depth=hills()[::2, ::2].copy())
    assert mean_difference(draw_one(runner, control=small), draw_one(runner, control=DEPTH)) < 3


def test_batched_equals_alone(runner: SdxlRunner) -> None:
    """Different steps, schedulers, guidance, strengths, with and without depth: one batch."""
    requests = [
        make_request(
            scheduler=scheduler,
            seed=index,
            steps=3 + index % 3,
            cfg=1.0 if index % 3 == 0 else 2.0 + index,
            negative_prompt="fog" if index % 2 else None,
            control=DEPTH
            if index % 2
            else (None if index % 4 else dataclasses.replace(DEPTH, strength=0.3, end=0.6)),
        )
        for index, scheduler in enumerate(SCHEDULER_NAMES)
    ]
    together = draw(runner, *requests)
    for request, image in zip(requests, together, strict=True):
        [alone] = draw(runner, request)
        assert max_difference(image, alone) <= 2


def test_joining_at_a_later_step_changes_nothing(runner: SdxlRunner) -> None:
    first, second = (make_request(seed=seed, scheduler="dpm_sde") for seed in (1, 2))
    expected = [draw(runner, request)[0] for request in (first, second)]
    early, late = (admitted(runner, request) for request in (first, second))
    runner.prepare(early)
    step(runner, [early])
    runner.prepare(late)
    while not late.finished:
        step(runner, [state for state in (early, late) if not state.finished])
    for state, image in zip((early, late), expected, strict=True):
        assert max_difference(runner.decode(state).result()[0], image) <= 2


def test_adapter_switches_leave_nothing_behind(runner: SdxlRunner) -> None:
    other = (Adapter("experimance_historical", 1.0),)
    sequence = [(), TWO_ADAPTERS, other, TWO_ADAPTERS, (), other, ()]
    images: dict[Any, list[Any]] = {}
    for adapters in sequence:
        images.setdefault(adapters, []).append(draw_one(runner, adapters=adapters))
    for same in images.values():
        assert all_equal(same)
    firsts = [same[0] for same in images.values()]
    assert mean_difference(firsts[0], firsts[1]) > 0.5
    assert mean_difference(firsts[1], firsts[2]) > 0.5


def test_models_stay_apart(runner: SdxlRunner) -> None:
    before = draw_one(runner, adapters=DRONE)
    loaded(runner, "base")
    base = draw_one(runner, model="base")
    assert all_equal([before, draw_one(runner, adapters=DRONE)])
    assert mean_difference(before, base) > 0.5


def test_prompt_cache_answers_the_same(runner: SdxlRunner) -> None:
    """Under a LoRA that changes the text encoders, the cached embedding of none must not serve."""
    without, with_text_lora = ((), (Adapter("experimance", 1.0),))
    cold = draw_one(runner, adapters=with_text_lora)
    draw_one(runner, adapters=without)
    warm = draw_one(runner, adapters=with_text_lora)
    assert all_equal([cold, warm])


@pytest.mark.parametrize(
    "prompt",
    [
        "!!!!! " * 60,
        "!" * 2000,
        "(" * 1000,
        "a, " * 600,
        "word" * 500,
        "\U0001f3d4 snow \u5c71 \u0301",
        " ",
        "(x:0) y",
        "(x:0.5)" * 60,
        "<|endoftext|> <|startoftext|> river",
        "(<|endoftext|>:0.5) river (<|startoftext|>:0.2)",
    ],
)
def test_any_prompt_makes_a_picture(runner: SdxlRunner, prompt: str) -> None:
    image = draw_one(runner, prompt=prompt, negative_prompt=prompt[::-1], steps=1)
    assert image.std() > 1


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
def test_a_load_elsewhere_changes_no_picture(runner: SdxlRunner, scheduler: str) -> None:
    """While the libraries load a model, they set the process's default dtype."""
    changes = {"scheduler": scheduler, "control": DEPTH, "adapters": DRONE}
    expected = draw_one(runner, **changes)
    torch.set_default_dtype(torch.float16)
    try:
        assert all_equal([draw_one(runner, **changes), expected])
    finally:
        torch.set_default_dtype(torch.float32)


def test_loads_beside_running_requests(catalog: Catalog, store: ModelStore) -> None:
    """Models, ControlNet and LoRAs are read while pictures are made; all of it stays sound."""
    engine = Engine(SdxlRunner(catalog, store, "cpu"), queue_capacity=64, max_rows=8)
    engine.start()
    sets = [(), DRONE, TWO_ADAPTERS, (Adapter("experimance_future", 1.0),)]
    requests = [
        make_request(model=model, adapters=adapters, control=control, steps=2)
        for model in ("lightning", "hyper", "base")
        for adapters in sets
        for control in (None, DEPTH)
    ]
    tickets = engine.submit(requests)
    images = [ticket.future.result(120).pixels for ticket in tickets]
    assert engine.stop(timeout_s=10)
    fresh = SdxlRunner(catalog, store, "cpu")
    for request, image in zip(requests, images, strict=True):
        [expected] = draw(fresh, request)
        assert max_difference(image, expected) <= 2


def test_token_counts(runner: SdxlRunner) -> None:
    state = admitted(runner, make_request(prompt=LONG_PROMPT, negative_prompt="fog"))
    runner.prepare(state)
    assert state.conditioning is not None
    assert state.conditioning.prompt_tokens > 77 * (state.key.token_chunks - 1) - 77
    assert state.key.token_chunks >= 2
    assert state.conditioning.negative_prompt_tokens >= 1
    assert state.conditioning.prompt_embeds.shape[:2] == (2, 77 * state.key.token_chunks)


def test_pixels_are_a_picture(runner: SdxlRunner) -> None:
    image = draw_one(runner, width=320)
    assert image.shape == (256, 320, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5


def test_what_was_released_is_made_again(runner: SdxlRunner) -> None:
    before = [draw_one(runner) for _ in range(3)]  # plain, recorded, replayed
    runner.release_memory()
    assert all_equal([*before, draw_one(runner)])
