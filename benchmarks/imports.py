"""How long the engine's imports take, and whose they are. Runs anywhere.

    python -m benchmarks.imports [--repeats 3] [--out FILE]

Every import is a process of its own, files in the page cache. ``ms`` is what a package's own
modules take, without what they import; the importer is the module that imports the package first.
Times of packages are of the median run without garbage collection, as the server imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import MODEL_PACKAGES
from benchmarks.record import publish, table_of

MODULE = "experimance_controlnet.engine.sdxl"
SHOWN_MS = 25.0
"""What takes less is left out of the table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One package."""

    package: str
    ms: float
    modules: int
    imported_by: str


def clock(*flags: str) -> dict[str, Any]:
    """What ``benchmarks.import_clock`` says of one import."""
    command = [sys.executable, "-m", "benchmarks.import_clock", MODULE, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def packages(self_s: Mapping[str, float], importers: Mapping[str, str]) -> list[Row]:
    """The dearest first. Both arguments are by module."""
    modules: dict[str, list[str]] = {}
    for name in self_s:
        modules.setdefault(_package(name), []).append(name)
    rows = [
        Row(
            package=package,
            ms=round(1000 * sum(self_s[name] for name in names), 1),
            modules=len(names),
            imported_by=importers.get(package) or MODULE,
        )
        for package, names in modules.items()
    ]
    rows.sort(key=lambda row: row.ms, reverse=True)
    return [row for row in rows if row.ms >= SHOWN_MS]


def _package(module: str) -> str:
    """torch._dynamo is counted by itself: it is as large as the rest, and others need it."""
    return "torch._dynamo" if module.startswith("torch._dynamo") else module.partition(".")[0]


def main() -> None:
    """With and without garbage collection, in turns: a clock that drifts drifts for both."""
    parser = argparse.ArgumentParser(description="Measure the engine's imports.")
    parser.add_argument("--repeats", type=int, default=3, help="(default 3)")
    parser.add_argument("--out", type=Path, help="also write the JSON into this file")
    options = parser.parse_args()
    clock()  # the page cache
    collecting, resting = [], []
    for _ in range(options.repeats):
        collecting.append(clock("--collect-garbage")["seconds"])
        resting.append(clock())
    resting.sort(key=lambda one: one["seconds"])
    median = resting[len(resting) // 2]
    rows = packages(median["self_s"], median["importers"])
    facts = {
        "seconds": round(median["seconds"], 3),
        "seconds_collecting_garbage": round(statistics.median(collecting), 3),
        "modules": len(median["self_s"]),
        "repeats": options.repeats,
    }
    title = "{seconds} s for {modules} modules; {seconds_collecting_garbage} s with collections"
    table = table_of(title.format_map(facts), rows)
    publish("imports", table, rows, facts, MODEL_PACKAGES, options.out)


if __name__ == "__main__":
    main()
