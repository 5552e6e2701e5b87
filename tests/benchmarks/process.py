"""Benchmarks run as people run them: as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def run_benchmark(name: str, *arguments: str, out: Path, timeout_s: float) -> dict[str, Any]:
    """What it writes to ``out``, which is also what it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--out", str(out)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text("utf-8")) == printed
    return printed
