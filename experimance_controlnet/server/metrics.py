"""Numbers for Prometheus; one registry per application, so that several can live in a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from experimance_controlnet.data_types import PhaseTimes
from experimance_controlnet.engine.engine import Engine, EngineHealth
from experimance_controlnet.errors import (
    DeadlineExceededError,
    RequestAbortedError,
    UnavailableError,
)

PREFIX = "controlnet"
PHASES = ("queue", "encode", "denoise", "decode", "encode_image", "total")
SECONDS_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 20, 40, 80, 160)


class Metrics:
    """What has been counted since the start. All methods are called on the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}_requests",
            "Requests answered.",
            ["route", "status"],
            registry=self._registry,
        )
        self._images = Counter(
            f"{PREFIX}_images",
            "Images asked for, by how they ended.",
            ["model", "outcome"],
            registry=self._registry,
        )
        self._phases = Histogram(
            f"{PREFIX}_phase_seconds",
            "Where the time of an image went.",
            ["phase"],
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._workload = Counter(
            f"{PREFIX}_workload_units",
            "Workload of completed requests; 100 is a standard image.",
            registry=self._registry,
        )
        self._registry.register(_EngineNow(engine))

    def request_done(self, route: str, status: int) -> None:
        """``route`` is the path of the route, not of the request: few values."""
        self._requests.labels(route, str(status)).inc()

    def image_done(self, model: str, times: PhaseTimes) -> None:
        """An image was sent on its way."""
        self._images.labels(model, "completed").inc()
        for phase in PHASES:
            self._phases.labels(phase).observe(getattr(times, f"{phase}_s"))

    def workload_done(self, units: float) -> None:
        """A whole request was completed."""
        self._workload.inc(units)

    @contextmanager
    def counting_losses(self, model: str, images: int) -> Iterator[None]:
        """Counts the images of a request that ends with an error; ``model`` is a catalogue name."""
        try:
            yield
        except BaseException as error:
            self._images.labels(model, _outcome(error)).inc(images)
            raise

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineNow(Collector):
    """What is read off at the moment of asking."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        health = self._engine.health()
        for name, text, value in (
            ("queue_depth", "Images accepted and not finished.", health.queue_depth),
            ("queue_workload_units", "Workload of those.", health.queue_workload),
            ("engine_alive", "0 once the engine has failed.", health.alive and not health.hung),
            ("ram_bytes", "Resident memory.", psutil.Process().memory_info().rss),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=float(value))
        yield from self._models(health)
        yield from self._gpu()

    def _models(self, health: EngineHealth) -> Iterator[Metric]:
        for name, text, models in (
            ("model_loaded", "1 for each model on the device.", health.models_loaded),
            ("model_parked", "1 for each that waits in the host's memory.", health.models_parked),
        ):
            there = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["model"])
            for model in models:
                there.add_metric([model], 1)
            yield there
        loads = CounterMetricFamily(
            f"{PREFIX}_model_loads",
            "Models brought to the device, from disk or from the host's memory.",
            labels=["model", "source"],
        )
        seconds = CounterMetricFamily(
            f"{PREFIX}_model_load_seconds", "Time that took.", labels=["model", "source"]
        )
        for labels, load in self._engine.model_loads().items():
            loads.add_metric(labels, load.count)
            seconds.add_metric(labels, load.seconds)
        yield loads
        yield seconds

    def _gpu(self) -> Iterator[Metric]:
        memory = self._engine.gpu_memory()
        if memory is None:
            return
        gauge = GaugeMetricFamily(f"{PREFIX}_gpu_bytes", "Device memory.", labels=["kind"])
        gauge.add_metric(["allocated"], memory.allocated_bytes)
        gauge.add_metric(["reserved"], memory.reserved_bytes)
        gauge.add_metric(["total"], memory.total_bytes)
        yield gauge


def _outcome(error: BaseException) -> str:
    if isinstance(error, DeadlineExceededError):
        return "expired"
    if isinstance(error, UnavailableError):
        return "refused"
    # anything else that is no Exception is the cancellation of the request's task
    if isinstance(error, RequestAbortedError) or not isinstance(error, Exception):
        return "cancelled"
    return "failed"
