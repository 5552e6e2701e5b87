"""What a figure was measured with: a figure holds only there."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate")


def versions(device: torch.device) -> dict[str, str]:
    """Device, driver, Python and the packages that decide about speed."""
    found = {"device": "cpu", "python": platform.python_version()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    found["cuda"] = torch.version.cuda or "none"
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"  # there is no triton for CPUs
    return found


def git_commit() -> str:
    """Of the working tree; ``-dirty`` where it has changes, ``unknown`` where git cannot tell."""
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    """First line of what it prints; ``unknown`` where it cannot run."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else "unknown"
