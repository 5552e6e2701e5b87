"""A result file as the Markdown tables of BENCHMARKS.md.

python -m benchmarks.report benchmarks/results/nvidia-h200.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.figures import peer_rows, table_rows


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """The first row is the heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    columns = lines[0].count("|") - 1
    return "\n".join([lines[0], "|" + " --- |" * columns, *lines[1:]])


def main() -> None:
    """The command line: the path of a result file."""
    results = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    facts = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    print(f"{facts}\n\n{markdown(table_rows(results))}\n\n{markdown(peer_rows(results))}")


if __name__ == "__main__":
    main()
