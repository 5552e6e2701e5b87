"""What the other model costs: the standard request for one model and the other in turns.

    python -m benchmarks.model_switch --models-dir DIR [--limit-gb 16] [--out FILE]

Three ways: both models fit on the GPU; one has to leave for the other and waits in the host's
memory; it was unloaded and is read again, from the page cache. Milliseconds from ``Engine.submit``
to the pixels, medians; the same model again beside them. Without CUDA there is no limit, so nothing
leaves, and with ``--tiny`` the times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import MODEL_PACKAGES, device_facts, run_facts, versions
from benchmarks.full_size import FULL, MODEL, MODEL_IN_ONE_FILE, TINY, FamilyFiles, ensure_family
from benchmarks.ours import Memory, make_runner
from benchmarks.standard_request import FIRST_ERA, standard_request
from benchmarks.timing import Repeats, free_memory, median_ms, progress
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.tiers import GB

MODELS = (MODEL, MODEL_IN_ONE_FILE)
WARM_UP = 4
"""Both models twice: graphs are recorded at the second picture, where they stay."""

Draw = Callable[[str], None]


@contextmanager
def running_engine(files: FamilyFiles, device: torch.device, memory: Memory) -> Iterator[Engine]:
    """Stopped, and its memory given back, at the end of the block."""
    engine = Engine(make_runner(files, device, "fp16", memory), queue_capacity=1, max_rows=2)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(timeout_s=60)
        del engine
        free_memory(device)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


def draw_with(engine: Engine, files: FamilyFiles) -> Draw:
    """A function that makes a new picture with the named model."""
    numbers = itertools.count()

    def draw(model: str) -> None:
        request = standard_request(files.family, next(numbers), FIRST_ERA, model)
        [ticket] = engine.submit([request])
        ticket.future.result()

    return draw


def measure(
    files: FamilyFiles, device: torch.device, memory: Memory, repeats: Repeats
) -> dict[str, float]:
    """``same_ms``, ``other_ms``, ``read_again_ms``."""
    with running_engine(files, device, memory) as engine:
        draw = draw_with(engine, files)
        other_ms = median_ms(lambda number: draw(MODELS[number % 2]), repeats, device)
        same_ms = median_ms(lambda _: draw(MODEL), repeats, device)

        def read_again(_: int) -> None:
            for model in MODELS:
                engine.unload(model).result()
            draw(MODEL)

        return {
            "same_ms": same_ms,
            "other_ms": other_ms,
            "read_again_ms": median_ms(read_again, Repeats(1, 3), device),
        }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_switch", description=__doc__)
    add = parser.add_argument
    add("--models-dir", type=Path, default=Path("out/benchmark"))
    add("--tiny", action="store_true", help="a tiny family, for any machine")
    add("--limit-gb", type=float, default=16.0, help="too little for both models at once")
    add("--repeats", type=int, default=10)
    add("--commit", help="what is measured, where git cannot tell")
    add("--out", type=Path, help="also write the JSON into this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = ensure_family(TINY if options.tiny else FULL, options.models_dir.absolute(), device)
    ways = {"both_fit": Memory()}
    if device.type == "cuda":
        ways[f"limit_{options.limit_gb:g}_gb"] = Memory(limit_bytes=round(options.limit_gb * GB))
    repeats = Repeats(WARM_UP, options.repeats)
    result: dict[str, Any] = {
        "benchmark": "model_switch",
        "run": run_facts("model_switch", options.commit),
        "versions": device_facts(device) | versions(MODEL_PACKAGES),
    }
    for name, memory in ways.items():
        result[name] = measure(files, device, memory, repeats)
        progress(f"{name}: {result[name]}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
