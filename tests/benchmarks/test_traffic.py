"""Traffic on a real engine: every request is accounted for, every policy is what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pytest

from benchmarks.mixed_traffic import MODELS, draw_requests
from benchmarks.open_loop import Offer, offer
from benchmarks.policies import FIXED_BATCH, POLICIES
from benchmarks.traffic import COMPARED, Row
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import Asset, GenerationRequest
from tests.benchmarks.process import run_benchmark

COUNT = 24


@contextmanager
def running(runner: FakeRunner, policy: str) -> Iterator[Engine]:
    for model in MODELS:  # so that requests are admitted in the order in which they come
        runner.install(Asset("model", model), model)
    engine = Engine(
        runner,
        queue_capacity=COUNT,
        max_rows=8,
        new_batcher=POLICIES[policy](time.monotonic),
    )
    engine.start()
    yield engine
    assert engine.stop(timeout_s=5.0)


def offered(runner: FakeRunner, policy: str) -> Offer:
    requests = draw_requests(np.random.default_rng(1), COUNT)
    with running(runner, policy) as engine:
        return offer(engine, requests, np.linspace(0, 0.1, COUNT))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_accepted_request_finishes_or_fails(policy: str) -> None:
    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "advance" and requests[0].seed % 3 == 0:
            raise ValueError("every third one")

    made = offered(FakeRunner(fault=fault), policy)
    assert made.accepted == COUNT
    assert len(made.failures) == COUNT / 3
    assert made.finished == COUNT - len(made.failures)
    assert all(
        0 < one < made.seconds for latencies in made.latencies_s.values() for one in latencies
    )
    row = Row.of("50%", policy, [made, made])
    assert (row.accepted, row.failed) == (2 * COUNT, 2 * COUNT / 3)
    assert row.finished == row.all.finished == row.accepted - row.failed
    assert sum(model.finished for model in row.by_model.values()) == row.finished


def test_fcfs_completes_one_request_after_the_other() -> None:
    runner = FakeRunner()
    offered(runner, "fcfs")
    assert [ids for ids, _ in groupby(runner.batches)] == [[str(n)] for n in range(COUNT)]


def test_fixed_batches_start_and_end_together() -> None:
    runner = FakeRunner(step_s=0.002)
    offered(runner, "fixed")
    batches = [ids for ids, _ in groupby(runner.batches)]
    assert sorted(chain(*batches)) == sorted(map(str, range(COUNT)))
    assert max(map(len, batches)) in range(2, FIXED_BATCH + 1)


def test_a_fixed_batch_does_not_wait_for_company_for_ever() -> None:
    runner = FakeRunner()
    [alone] = draw_requests(np.random.default_rng(1), 1)
    with running(runner, "fixed") as engine:
        assert offer(engine, [alone], np.zeros(1)).finished == 1


@pytest.mark.timeout(300)
def test_the_real_engine_serves_the_same_requests_under_every_policy(tmp_path: Path) -> None:
    arguments = ("--seconds", "1", "--rounds", "2", "--scale", "0.125")
    out = tmp_path / "traffic.json"
    result = run_benchmark("traffic", *arguments, out=out, timeout_s=280)
    assert result.keys() >= {"date", "commit", "command", "versions", "machine", "seed"}
    assert len(result["capacity_by_round"]) == 2 and min(result["capacity_by_round"]) > 0
    names = [(row["load"], row["policy"]) for row in result["rows"]]
    assert names == [(load, one) for load in ("burst", "50%", "80%", "95%") for one in COMPARED]
    for row in result["rows"]:
        assert row["accepted"] == row["finished"] == 2 * result["requests_a_round"]
        assert row["failed"] == 0
        assert sum(model["finished"] for model in row["by_model"].values()) == row["finished"]
        assert row["by_model"].keys() == result["rows"][0]["by_model"].keys()
        assert 0 < row["all"]["mean"] <= row["all"]["p95"]
        assert len(row["mean_by_round"]) == len(row["others_cores_by_round"]) == 2
