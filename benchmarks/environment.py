"""What a figure was measured with, when and by which command: a figure holds only there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SERVER_PACKAGES = ("fastapi", "isal", "numpy", "pillow", "pybase64", "pydantic", "uvicorn")
"""Those that decide about the speed of the server's own work."""
MODEL_PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate")
"""The same for the model's."""

_FOLDER = str(Path(__file__).parent)
_LOAD_AT_START = os.getloadavg()[0]
"""Processes that wanted to run in the minute before; with as many as cores, times are too long."""


def run_facts(benchmark: str, commit: str | None = None) -> dict[str, str]:
    """When and how this process measures. ``commit`` is what it measures, where git cannot tell."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit or _output("git", "-C", _FOLDER, "describe", "--always", "--dirty"),
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and these packages; ``none`` where one is not installed, as triton without CUDA."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def device_facts(device: torch.device) -> dict[str, str]:
    """Name of the device, driver and CUDA version."""
    import torch  # not above: the server's own benchmarks do without it

    found = {"device": "cpu"}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found | {"cuda": torch.version.cuda or "none"}


def machine() -> dict[str, Any]:
    """The host, and how busy it was before."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(_LOAD_AT_START, 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; platform.processor() is empty there
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def _output(*command: str) -> str:
    """First line of what it prints; ``unknown`` where it cannot run."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else "unknown"
