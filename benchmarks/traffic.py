"""Mixed traffic on the real engine: our batching policy beside others, same requests, same moments.

    python -m benchmarks.traffic [--seconds 300] [--scale 0.25] [--rounds 3] [--out FILE]

What ``benchmarks/batching.py`` simulates, done: the product's ``Engine`` and ``SdxlRunner`` make
the pictures of the embedded model on the CPU, on one thread. An open loop: requests come at moments
drawn beforehand, however many wait already. The models stay in memory, so what is switched is what
a step uses of them, and adapters.

A round draws its requests and moments once. First all requests are offered at once (``burst``);
what first come, first served takes for them is the round's capacity. Then the same requests come at
50, 80 and 95 % of it. The moments are those of a Poisson process of which exactly so many arrivals
fall into the time that the load gives them: uniform, sorted. Policies take turns for each load,
every round in another order; figures are medians of the rounds. Each policy has one engine for the
whole run, as a server has, and keeps what it has learnt.

Latency is from the drawn moment, not from when this process came to submit, to the finished pixels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.environment import MODEL_PACKAGES
from benchmarks.mixed_traffic import ERAS, MODELS, SIZES, draw_requests
from benchmarks.open_loop import Offer, offer
from benchmarks.ours import load_assets
from benchmarks.pictures import hills
from benchmarks.policies import POLICIES
from benchmarks.record import publish
from benchmarks.timing import progress
from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.request import Control, GenerationRequest
from experimance_controlnet.engine.sdxl import SdxlRunner
from experimance_controlnet.settings import Settings

COMPARED = ("ours", "fixed", "fcfs")
LOADS = (None, 0.5, 0.8, 0.95)
"""None is the burst: it comes first, since it says what the others are shares of."""
SIDE_MULTIPLE_PX = 32
"""The network halves its latents twice, and a latent is 8 pixels."""
WARM_UP_REQUESTS = 8
MAX_WAITING = 10_000
"""No request is refused here."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One engine a policy, over the same runner."""

    engines: dict[str, Engine]
    scale: float
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def draw(self, seed: int, count: int) -> list[GenerationRequest]:
        """With a depth map each."""
        requests = draw_requests(np.random.default_rng(seed), count, self.scale)
        return [with_depth(request) for request in requests]

    def offer(
        self, policy: str, requests: Sequence[GenerationRequest], moments_s: NDArray[np.float64]
    ) -> Offer:
        """To the engine of that policy."""
        # encoded prompts are kept: without a number of its own, only the first offer would pay
        number = next(self._numbers)
        own = [replace(one, prompt=f"{one.prompt}, offer {number}") for one in requests]
        return offer(self.engines[policy], own, moments_s)


@contextmanager
def running_engines(scale: float) -> Iterator[Bench]:
    """Everything is in memory; stopped at the end of the block."""
    max_rows: int = Settings.model_fields["max_batch_rows"].default
    with TemporaryDirectory() as folder, ExitStack() as stack:
        runner = SdxlRunner(load_catalog("embedded"), ModelStore(Path(folder)), "cpu")
        [any_request] = draw_requests(np.random.default_rng(0), 1)
        for model, adapters in itertools.product(MODELS, ERAS.values()):
            load_assets(runner, with_depth(replace(any_request, model=model, adapters=adapters)))
        engines = {}
        for policy in COMPARED:
            engine = Engine(
                runner,
                queue_capacity=MAX_WAITING,
                max_rows=max_rows,
                new_batcher=POLICIES[policy](time.monotonic),
            )
            engine.start()
            stack.callback(engine.stop, timeout_s=10.0)
            engines[policy] = engine
        yield Bench(engines, scale)


def with_depth(request: GenerationRequest) -> GenerationRequest:
    """The same, steered."""
    return replace(request, control=Control("sdxl_small", hills(request.width), strength=0.8))


# ---- the run ----------------------------------------------------------------------------------

Offers = dict[tuple[str, str], list[Offer]]
"""By load and policy, one a round."""


def name_of(load: float | None) -> str:
    """As the rows have it."""
    return "burst" if load is None else f"{load:.0%}"


def plan_count(bench: Bench, seed: int, seconds: float, rounds: int) -> int:
    """How many requests a round may have. Warms everything up to find out."""
    requests = bench.draw(seed, WARM_UP_REQUESTS)
    at_once = np.zeros(len(requests))
    for policy in COMPARED:
        bench.offer(policy, requests, at_once)
    solo_s = bench.offer("fcfs", requests, at_once).seconds / len(requests)
    round_s = solo_s * len(COMPARED) * sum(1.0 if load is None else 1 / load for load in LOADS)
    return max(2, round(seconds / (rounds * round_s)))


def run_round(bench: Bench, offers: Offers, number: int, seed: int, count: int) -> float:
    """Offer the round's requests to every policy under every load. Returns the capacity, images
    a second.
    """
    requests = bench.draw(seed, count)
    moments = np.sort(np.random.default_rng([seed, 1]).uniform(size=count))
    capacity = 0.0
    for turn, load in enumerate(LOADS):
        duration_s = 0.0 if load is None else count / (load * capacity)
        first = (number + turn) % len(COMPARED)
        for policy in (*COMPARED[first:], *COMPARED[:first]):
            made = bench.offer(policy, requests, duration_s * moments)
            offers.setdefault((name_of(load), policy), []).append(made)
            if not made.finished:
                raise RuntimeError(f"nothing is made here: {made.failures[0]}")
            mean_s = statistics.fmean(itertools.chain(*made.latencies_s.values()))
            progress(
                f"round {number}, {name_of(load)}, {policy}: {made.finished} of {made.accepted} in "
                f"{made.seconds:.1f} s, mean {mean_s:.2f} s, others {made.others_cores:.2f} cores"
            )
        if load is None:
            capacity = count / offers[name_of(None), "fcfs"][-1].seconds
    return capacity


# ---- figures ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from the drawn moment to the pixels; each figure is the median of the rounds'."""

    finished: int
    """In all rounds."""
    mean: float
    p95: float

    @classmethod
    def of(cls, rounds: list[list[float]]) -> Latency:
        """Of what was finished, round by round; a round without any does not count."""
        some = [latencies_s for latencies_s in rounds if latencies_s]
        return cls(
            finished=sum(map(len, some)),
            mean=round(statistics.median(map(statistics.fmean, some)), 3),
            p95=round(statistics.median(float(np.percentile(one, 95)) for one in some), 3),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One policy under one load."""

    load: str
    policy: str
    accepted: int
    finished: int
    failed: int
    images_per_s: float
    """Median of the rounds: finished over the time until the last is; no more than arrive."""
    all: Latency
    by_model: dict[str, Latency]
    mean_by_round: list[float]
    others_cores_by_round: list[float]

    @classmethod
    def of(cls, load: str, policy: str, rounds: list[Offer]) -> Row:
        """The rounds of one policy under one load."""
        everything = [list(itertools.chain(*one.latencies_s.values())) for one in rounds]
        models = {
            model: [one.latencies_s.get(model, []) for one in rounds]
            for model in MODELS
            if any(model in one.latencies_s for one in rounds)
        }
        return cls(
            load=load,
            policy=policy,
            accepted=sum(one.accepted for one in rounds),
            finished=sum(one.finished for one in rounds),
            failed=sum(len(one.failures) for one in rounds),
            images_per_s=round(statistics.median(o.finished / o.seconds for o in rounds), 3),
            all=Latency.of(everything),
            by_model={model: Latency.of(latencies_s) for model, latencies_s in models.items()},
            mean_by_round=[round(statistics.fmean(one), 3) for one in everything],
            others_cores_by_round=[round(one.others_cores, 2) for one in rounds],
        )


def table_of(rows: Sequence[Row], title: str) -> Table:
    """For people."""
    table = Table(title=title)
    for name in ("load", "policy", "accepted", "failed", "img/s", "mean", "p95"):
        table.add_column(name, justify="right")
    for model in MODELS:
        table.add_column(f"{model}\nmean / p95", justify="right")
    for row in rows:
        known = [row.by_model.get(model) for model in MODELS]
        classes = [f"{one.mean:.2f} / {one.p95:.2f}" if one else "-" for one in known]
        counts = (str(row.accepted), str(row.failed), f"{row.images_per_s:.2f}")
        whole = (f"{row.all.mean:.2f}", f"{row.all.p95:.2f}")
        last = row.policy == COMPARED[-1]
        table.add_row(row.load, row.policy, *counts, *whole, *classes, end_section=last)
    return table


def parse_options() -> argparse.Namespace:
    """The command line."""

    def scale(text: str) -> float:
        sides_px = {float(text) * side_px for size in SIZES for side_px in size}
        if any(side_px < 1 or side_px % SIDE_MULTIPLE_PX for side_px in sides_px):
            raise argparse.ArgumentTypeError(f"sides have to be multiples of {SIDE_MULTIPLE_PX} px")
        return float(text)

    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=300.0, help="about so long in all (default 300)")
    add("--scale", type=scale, default=0.25, help="of the sides, 1024 px and less (default 0.25)")
    add("--rounds", type=int, default=3, help="medians are of so many (default 3)")
    add("--seed", type=int, default=201, help="of the first round (default 201)")
    add("--out", type=Path, help="also write the JSON into this file")
    return parser.parse_args()


def main() -> None:
    """Offer, count, show. Exit status 1: a request failed."""
    options = parse_options()
    # the other cores are left to the clients and to whatever else runs: steadier figures
    torch.set_num_threads(1)
    offers: Offers = {}
    with running_engines(options.scale) as bench:
        count = plan_count(bench, options.seed, options.seconds, options.rounds)
        progress(f"{count} requests a round")
        capacities = [
            run_round(bench, offers, number, options.seed + number, count)
            for number in range(options.rounds)
        ]
    rows = [
        Row.of(name_of(load), policy, offers[name_of(load), policy])
        for load in LOADS
        for policy in COMPARED
    ]
    facts = {
        "model": "embedded",
        "threads": torch.get_num_threads(),
        "scale": options.scale,
        "seed": options.seed,
        "requests_a_round": count,
        "capacity_by_round": [round(capacity, 3) for capacity in capacities],
    }
    title = "Latency in seconds, embedded model on one thread"
    publish("traffic", table_of(rows, title), rows, facts, MODEL_PACKAGES, options.out)
    failures = [failure for rounds in offers.values() for one in rounds for failure in one.failures]
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
