"""What a benchmark leaves behind: a table for people, one JSON line, a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import machine, run_facts, versions
from experimance_controlnet import __version__


def table_of(title: str, rows: Sequence[Any]) -> Table:
    """A column a field; ``rows`` are dataclasses of one kind whose fields are single values."""
    lines = [asdict(row) for row in rows]
    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    return table


def publish(
    benchmark: str,
    table: Table,
    rows: Sequence[Any],
    facts: Mapping[str, Any],
    packages: Sequence[str],
    out: Path | None,
) -> None:
    """Print the table, and the rows (dataclasses) with everything else as one JSON line.

    ``facts`` are the benchmark's own; when, with what and where it was measured is added, with the
    versions of ``packages``. ``out``: a file for the same JSON, one line a row.
    """
    Console(width=130).print(table)
    lines = [asdict(row) for row in rows]
    head = {
        "benchmark": benchmark,
        **run_facts(benchmark),
        "versions": {"server": __version__, **versions(packages)},
        "machine": machine(),
        **facts,
    }
    print(json.dumps({**head, "rows": lines}))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_readable(head, lines), "utf-8")


def _readable(head: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    fields = [f' "{name}": {json.dumps(value)}' for name, value in head.items()]
    rows = ",\n".join(f"  {json.dumps(line)}" for line in lines)
    return "{\n" + ",\n".join([*fields, f' "rows": [\n{rows}\n ]']) + "\n}\n"
