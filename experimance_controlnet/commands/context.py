"""What every command on models gets, how it picks entries, and how it speaks.

Results go to stdout: as text, or with ``--json`` as one document and nothing else. Errors go to
stderr, one line each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from experimance_controlnet.catalog.entries import Entry, entries_of
from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.errors import UnknownNameError, WorkerError

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses."""
_PIPE_COLUMNS = 400


@dataclass(frozen=True, slots=True)
class Context:
    """The catalogue, the folder of the model files, and whether results are JSON."""

    catalog: Catalog
    models_dir: Path
    as_json: bool

    def entries(self) -> list[Entry]:
        """All of the catalogue."""
        return entries_of(self.catalog)

    def select(self, names: Sequence[str]) -> list[Entry]:
        """The entries of these names, in the catalogue's order; a name may be ``KIND.NAME``.

        Raises UnknownNameError where a name means none, or several.
        """
        entries = self.entries()
        chosen: list[Entry] = []
        for name in names:
            found = [entry for entry in entries if name in (entry.name, entry.full_name)]
            if not found:
                raise UnknownNameError(
                    "NAME",
                    f"the catalogue {self.catalog.name} has no entry {name!r}; "
                    "`models list` shows what it has",
                )
            if len(found) > 1:
                choice = " or ".join(entry.full_name for entry in found)
                raise UnknownNameError("NAME", f"{name!r} can be {choice}: say which")
            chosen += found
        return [entry for entry in entries if entry in chosen]


def output() -> Console:
    """For tables on stdout; in a pipe nothing is cut to a terminal's width."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """The one thing on stdout."""
    print(json.dumps(document, indent=2))


def complain(error: WorkerError, about: str | None = None) -> None:
    """One line on stderr: the error's code, what it is about, and the message."""
    subject = f"{about}: " if about else ""
    line = f"controlnet-worker: {error.code}: {subject}{error.message}"
    print(" ".join(line.split()), file=sys.stderr)


def size_text(size_bytes: int | None) -> str:
    """As people read it, in decimal units; ? where nobody knows."""
    return "?" if size_bytes is None else decimal(size_bytes)
