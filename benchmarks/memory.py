"""The standard request where memory is short: limits that a smaller card would set, the tier that
the server chooses for each, and what that costs.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.full_size import FamilyFiles
from benchmarks.ours import Memory, Ours
from benchmarks.quality import psnr_db
from benchmarks.standard_request import FIRST_ERA, standard_request
from benchmarks.timing import Repeats, free_memory, progress
from experimance_controlnet.engine.request import PixelImage
from experimance_controlnet.engine.tiers import GB, MINIMAL, PARKED, RESIDENT

Result = dict[str, Any]

LIMITS_GB = (16, 12, 8)


def measure_tiers(
    files: FamilyFiles, device: torch.device, precision: str, repeats: Repeats
) -> Result:
    """By limit: the tier, one request at a time, a switch of adapters, the memory really taken, and
    the PSNR of a picture against that of the first limit. A CPU has no limits: by tier there.
    """
    found: Result = {}
    first: PixelImage | None = None
    for name, memory in _ways(device).items():
        progress(f"memory {precision}: {name}")
        ours = Ours(files, device, precision, memory)
        switch = ours.measure_switch(repeats)
        # three: the last has found all work recorded
        pictures = [ours.draw(standard_request(files.family, n, FIRST_ERA)) for n in range(3)]
        first = pictures[-1] if first is None else first
        found[name] = {
            "tier": ours.runner.memory_tier,
            **switch,
            **ours.measure_latency(repeats),
            "psnr_db": round(psnr_db(pictures[-1], first), 2),
        }
        del ours
        free_memory(device)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def _ways(device: torch.device) -> dict[str, Memory]:
    if device.type != "cuda":
        return {tier.name: Memory(tier=tier) for tier in (RESIDENT, PARKED, MINIMAL)}
    return {f"{limit}_gb": Memory(limit_bytes=limit * GB) for limit in LIMITS_GB}
