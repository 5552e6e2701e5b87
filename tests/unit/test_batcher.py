"""Who runs next, and with whom."""

from __future__ import annotations

from typing import Any

import torch

from experimance_controlnet.engine.batcher import Batcher
from experimance_controlnet.engine.request import (
    Adapter,
    BatchKey,
    GenerationRequest,
    PhaseTimer,
    RequestState,
)
from experimance_controlnet.engine.schedulers import make_scheduler


def state(cfg: float = 2.0, chunks: int = 1, **changes: Any) -> RequestState:
    fields = {"model": "lightning", "adapters": (), "width": 512, "height": 512, **changes}
    request = GenerationRequest(
        request_id="r",
        prompt="p",
        negative_prompt=None,
        steps=6,
        cfg=cfg,
        seed=0,
        scheduler="euler",
        **fields,
    )
    key = BatchKey(token_chunks=chunks, **fields)
    scheduler = make_scheduler("euler", {}, 6)
    return RequestState(request, key, PhaseTimer(0.0), scheduler, torch.Generator())


def filled(*states: RequestState, max_rows: int = 8) -> Batcher:
    batcher = Batcher(max_rows)
    for one in states:
        batcher.add(one)
    return batcher


def test_nothing_waits() -> None:
    assert filled().next_batch() == []


def test_equal_keys_share_a_batch() -> None:
    states = [state(), state(cfg=7.0), state(cfg=1.0)]
    assert filled(*states).next_batch() == states


def test_other_weights_or_shapes_do_not() -> None:
    oldest = state()
    others = [
        state(model="base"),
        state(adapters=(Adapter("drone", 0.8),)),
        state(width=768),
        state(height=768),
        state(chunks=2),
    ]
    assert filled(oldest, *others).next_batch() == [oldest]


def test_the_oldest_chooses_and_its_kind_rides_along() -> None:
    a1, b, a2 = state(), state(model="base"), state()
    batcher = filled(a1, b, a2)
    assert batcher.next_batch() == [a1, a2]
    batcher.remove(a1)
    assert batcher.next_batch() == [b]
    batcher.remove(b)
    assert batcher.next_batch() == [a2]


def test_rows_are_the_limit_not_requests() -> None:
    guided, plain = [state() for _ in range(3)], [state(cfg=1.0) for _ in range(3)]
    batch = filled(*guided, *plain, max_rows=7).next_batch()
    assert batch == [*guided, plain[0]]


def test_a_narrow_request_fills_the_gap_behind_a_wide_one() -> None:
    first, wide, narrow = state(), state(), state(cfg=1.0)
    assert filled(first, wide, narrow, max_rows=3).next_batch() == [first, narrow]


def test_one_request_may_exceed_the_limit() -> None:
    only = state()
    assert filled(only, max_rows=1).next_batch() == [only]
