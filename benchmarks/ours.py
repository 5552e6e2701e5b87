"""Our side: the real runner, reached directly for its parts and through the engine for the whole.

Only what the engine itself uses is called: the ``Runner`` protocol and ``Engine.submit``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from benchmarks.full_size import Family, FamilyFiles
from benchmarks.standard_request import FIRST_ERA, SECOND_ERA, standard_request
from benchmarks.timing import Repeats, free_memory, median_ms, progress
from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.precision import EMULATED_FP8, FP32
from experimance_controlnet.engine.request import (
    GenerationRequest,
    GenerationResult,
    PixelImage,
    RequestState,
)
from experimance_controlnet.engine.runner import Runner
from experimance_controlnet.engine.sdxl import SdxlRunner
from experimance_controlnet.engine.tiers import MemoryTier
from experimance_controlnet.settings import Settings

Result = dict[str, Any]

RAMP_S = 3.0
"""How long the clients are at work before their pictures count."""
_ON_A_CPU = {"fp16": FP32, "fp8": EMULATED_FP8}
PHASES = ("queue_s", "encode_s", "denoise_s", "decode_s")


@dataclass(frozen=True, slots=True)
class Memory:
    """What the runner is told about memory; by default what the server tells it."""

    tier: str | MemoryTier = "auto"
    limit_bytes: int | None = None


def make_runner(
    files: FamilyFiles, device: torch.device, precision: str, memory: Memory = Memory()
) -> SdxlRunner:
    """As the server does. A CPU computes in fp32 for fp16, and emulates fp8 on top of that."""
    catalog, store = load_catalog(str(files.catalog)), ModelStore(files.catalog.parent)
    chosen = precision if device.type == "cuda" else _ON_A_CPU[precision]
    return SdxlRunner(catalog, store, device.type, chosen, memory.tier, memory.limit_bytes)


def load_assets(runner: Runner, request: GenerationRequest) -> None:
    """Bring what the request needs to memory, as the engine would."""
    while (asset := runner.missing(request)) is not None:
        runner.install(asset, runner.load(asset))


class Ours:
    """One runner in one precision, both eras' adapters read."""

    def __init__(
        self,
        files: FamilyFiles,
        device: torch.device,
        precision: str,
        memory: Memory = Memory(),
    ) -> None:
        self.family: Family = files.family
        self.device, self.precision = device, precision
        progress(f"ours {precision}: loading")
        self.runner = make_runner(files, device, precision, memory)
        for era in (FIRST_ERA, SECOND_ERA):
            load_assets(self.runner, standard_request(self.family, 0, era))

    # ---- the runner, called directly --------------------------------------------------------

    def predictions_along(
        self, request: GenerationRequest, path: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Our guided noise at each step while the latents follow the predictions in ``path``; all
        (1, 4, H/8, W/8) fp32, ours on the CPU.
        """
        state = self.begin(request)
        predictions = []
        for given in path:
            [prediction] = self.runner.predict([state])
            predictions.append(prediction.float().cpu())
            self.runner.advance(state, given.to(self.device))
        return predictions

    def draw(self, request: GenerationRequest) -> PixelImage:
        """One picture, alone."""
        return self.runner.decode(self._finished(request)).result()[0]

    def measure_vae(self, repeats: Repeats) -> Result:
        """Latents to uint8 pixels in the host's memory: more than the peers' VAE time holds."""
        state = self._finished(standard_request(self.family, 0, FIRST_ERA))
        return {
            "vae_ms": median_ms(lambda _: self.runner.decode(state).result(), repeats, self.device)
        }

    def measure_switch(self, repeats: Repeats) -> Result:
        """What a step costs more where the step before was another era's."""
        states = [
            self.begin(standard_request(self.family, 0, era)) for era in (FIRST_ERA, SECOND_ERA)
        ]

        def step(number: int) -> None:
            self.runner.predict([states[number % 2]])

        def same(number: int) -> None:
            self.runner.predict([states[0]])

        steady_ms = median_ms(same, repeats, self.device)
        switching_ms = median_ms(step, repeats, self.device)
        return {
            "adapter_switch_ms": round(switching_ms - steady_ms, 2),
            "step_ms": steady_ms,
            "step_after_switch_ms": switching_ms,
        }

    def begin(self, request: GenerationRequest) -> RequestState:
        """Admitted and prepared, before its first step."""
        load_assets(self.runner, request)
        state = self.runner.admit(request, time.monotonic())
        self.runner.prepare(state)
        return state

    def _finished(self, request: GenerationRequest) -> RequestState:
        state = self.begin(request)
        while not state.finished:
            [prediction] = self.runner.predict([state])
            self.runner.advance(state, prediction)
        return state

    # ---- through the engine -----------------------------------------------------------------

    @contextmanager
    def _engine(self) -> Iterator[Callable[[int], GenerationResult]]:
        """Yields a function that makes the picture of that number and waits for it."""
        defaults = Settings.model_fields
        engine = Engine(
            self.runner,
            queue_capacity=defaults["queue_capacity"].default,
            max_rows=defaults["max_batch_rows"].default,
        )
        engine.start()

        def draw(number: int) -> GenerationResult:
            [ticket] = engine.submit([standard_request(self.family, number, FIRST_ERA)])
            return ticket.future.result()

        try:
            yield draw
        finally:
            engine.stop(timeout_s=60)

    def measure_latency(self, repeats: Repeats) -> Result:
        """One request at a time, from ``submit`` to a PIL image."""
        self._forget_peak()
        phases: dict[str, list[float]] = {name: [] for name in PHASES}
        with self._engine() as draw:

            def one(number: int) -> None:
                result = draw(number)
                Image.fromarray(result.pixels)
                for name in PHASES:
                    phases[name].append(1000 * getattr(result, name))

            latency_ms = median_ms(one, repeats, self.device)
        return {
            "latency_ms": latency_ms,
            # as the engine sees them: where it need not wait for the device, it does not
            "phases_ms": {
                name.removesuffix("_s"): round(statistics.median(times[repeats.warm_up :]), 2)
                for name, times in phases.items()
            },
            "memory_gb": self._memory_gb(),
        }

    def measure_throughput(self, clients: Sequence[int], seconds: float) -> Result:
        """Closed loop: each client asks for its next picture as soon as it has the last one."""
        self._forget_peak()
        rates: dict[str, float] = {}
        with self._engine() as draw:
            for count in clients:
                rate = self._rate(draw, count, min(RAMP_S, seconds), seconds)
                rates[str(count)] = round(rate, 3)
                progress(f"throughput {self.precision}: {count} clients {rate:.2f} images/s")
        return {
            "images_per_s": rates,
            "best_ips": max(rates.values()),
            "memory_gb": self._memory_gb(),
        }

    def _rate(
        self,
        draw: Callable[[int], GenerationResult],
        clients: int,
        ramp_s: float,
        seconds: float,
    ) -> float:
        """Images per second that were finished in a window of ``seconds`` after ``ramp_s``, with
        all clients at work before, in and after it.
        """
        began_s = time.perf_counter() + ramp_s
        ended_s = began_s + seconds

        def client(first: int) -> int:
            finished = 0
            for number in itertools.count(first, clients):
                draw(number)
                now_s = time.perf_counter()
                finished += began_s <= now_s < ended_s
                if now_s >= ended_s:
                    break
            return finished

        # other prompts than those of the calls before
        first = 10_000 * clients
        with ThreadPoolExecutor(clients) as pool:
            return sum(pool.map(client, range(first, first + clients))) / seconds

    def _forget_peak(self) -> None:
        free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _memory_gb(self) -> Result | None:
        """10^9 bytes. ``device_used`` is the driver's figure: context and libraries are in it."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "peak_allocated": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2),
            "peak_reserved": round(torch.cuda.max_memory_reserved(self.device) / 1e9, 2),
            "device_used": round((total - free) / 1e9, 2),
        }
