"""What a step, a decode and a switch take on this device: the table of the simulated one.

    python -m benchmarks.step_costs --models-dir DIR [--out FILE]

The real runner on the random SDXL family of ``full_size.py``, everything recorded before it is
timed. ``switch_ms.model`` is no measurement: the engine does not bring parked models back yet, so
it stays the estimate that ``--model-switch-ms`` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.batching import RESULTS
from benchmarks.environment import MODEL_PACKAGES, device_facts, run_facts, versions
from benchmarks.full_size import FULL, TINY, ensure_family
from benchmarks.mixed_traffic import SIZES
from benchmarks.ours import Ours
from benchmarks.pictures import hills
from benchmarks.standard_request import FIRST_ERA, standard_request
from benchmarks.timing import Repeats, median_ms, progress
from experimance_controlnet.engine.request import GenerationRequest, RequestState

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
"""The widest is a fixed batch of eight guided requests."""
WARM_UP = 3
"""Run, record, replay."""


def requests_of(ours: Ours, rows: int, width: int, height: int) -> list[GenerationRequest]:
    """Guided ones, two rows each, and for an odd number one without guidance."""
    guidance = [2.0] * (rows // 2) + [1.0] * (rows % 2)
    plain = standard_request(ours.family, 0, FIRST_ERA)
    assert plain.control is not None
    control = dataclasses.replace(plain.control, depth=hills(width))
    return [
        dataclasses.replace(plain, cfg=cfg, seed=seed, width=width, height=height, control=control)
        for seed, cfg in enumerate(guidance)
    ]


def measure_size(ours: Ours, width: int, height: int, repeats: Repeats) -> dict[str, Any]:
    """Milliseconds of a step by rows, and of a decode."""
    step_ms = {}
    for rows in ROWS:
        states = [ours.begin(request) for request in requests_of(ours, rows, width, height)]
        step_ms[str(rows)] = median_ms(partial(_predict, ours, states), repeats, ours.device)
    [request] = requests_of(ours, 2, width, height)
    state = ours.begin(request)
    decode_ms = median_ms(lambda _: ours.runner.decode(state).result(), repeats, ours.device)
    progress(f"{width}x{height}: step {step_ms}, decode {decode_ms} ms")
    return {"step_ms": step_ms, "decode_ms": decode_ms}


def _predict(ours: Ours, states: list[RequestState], _: int) -> None:
    ours.runner.predict(states)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_costs", description=__doc__)
    parser.add_argument("--models-dir", type=Path, default=Path("out/benchmark"))
    parser.add_argument("--tiny", action="store_true", help="a tiny family, for any machine")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model-switch-ms", type=float, default=400.0, help="an estimate")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_costs.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = ensure_family(TINY if options.tiny else FULL, options.models_dir.absolute(), device)
    ours, repeats = Ours(files, device, "fp16"), Repeats(WARM_UP, options.repeats)
    facts = device_facts(device)
    table = {
        "device": facts["device"],
        "source": "Measured: medians. Estimated: switch_ms.model, of a model parked in the host's "
        "memory, which this engine does not do.",
        "run": run_facts("step_costs", options.commit),
        "versions": facts | versions(MODEL_PACKAGES),
        "sizes": {f"{w}x{h}": measure_size(ours, w, h, repeats) for w, h in SIZES},
        "switch_ms": {
            "adapters": ours.measure_switch(repeats)["adapter_switch_ms"],
            "model": options.model_switch_ms,
        },
    }
    options.out.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
