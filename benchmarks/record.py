"""What a benchmark of the CPU's work leaves behind: a table for people, one JSON line, a file."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experimance_controlnet import __version__

_LOAD_AT_START = os.getloadavg()[0]
"""Processes that wanted to run in the minute before; with as many as cores, times are too long."""
_PACKAGES = ("fastapi", "isal", "numpy", "pillow", "pybase64", "pydantic", "uvicorn")


def publish(
    benchmark: str, title: str, rows: Sequence[Any], facts: Mapping[str, Any], out: Path | None
) -> None:
    """Print the rows (dataclasses of one kind) as a table and everything as one JSON line.

    ``facts`` are the benchmark's own; when, with what and where it was measured is added.
    ``out``: a file for the same JSON, one line a row.
    """
    lines = [asdict(row) for row in rows]
    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    Console().print(table)
    head = {"benchmark": benchmark, **_circumstances(benchmark), **facts}
    print(json.dumps({**head, "rows": lines}))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_readable(head, lines), "utf-8")


def _readable(head: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    fields = [f' "{name}": {json.dumps(value)}' for name, value in head.items()]
    rows = ",\n".join(f"  {json.dumps(line)}" for line in lines)
    return "{\n" + ",\n".join([*fields, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def _circumstances(benchmark: str) -> dict[str, Any]:
    versions = {package: version(package) for package in _PACKAGES}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
        "versions": {"server": __version__, "python": platform.python_version(), **versions},
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "load_before": round(_LOAD_AT_START, 2),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; platform.processor() is empty there
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
