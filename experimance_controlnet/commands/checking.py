"""``models verify``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from experimance_controlnet.catalog.entries import Entry
from experimance_controlnet.catalog.inventory import FileCheck, content_files, verify
from experimance_controlnet.catalog.location import place_of
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.commands.context import (
    FAILURE,
    OK,
    Context,
    complain,
    output,
    print_json,
    size_text,
)
from experimance_controlnet.errors import BadWeightsError, ModelFileError


def run(context: Context, arguments: argparse.Namespace) -> int:
    """Read every byte of the files that are on this disk.

    Fails for damaged files, and for named entries whose files are not there.
    """
    entries = context.select(arguments.names) if arguments.names else context.entries()
    sources = list(dict.fromkeys(source for entry in entries for source in entry.sources))
    there = [source for source in sources if place_of(source, context.models_dir).exists()]
    missing = [entry for entry in entries if not set(entry.sources) <= set(there)]
    rows = _check(context, entries, there)
    if context.as_json:
        names = [entry.full_name for entry in missing]
        print_json({"models_dir": str(context.models_dir), "files": rows, "missing": names})
    else:
        _show(rows, missing)
    damaged = [row for row in rows if row["fault"] is not None]
    for row in damaged:
        what = f"{row['path']}: {row['fault']}; remove {row['entries'][0]}, then fetch it again"
        complain(BadWeightsError(what))
    for entry in missing if arguments.names else ():
        complain(ModelFileError("is not on this disk, or not all of it; fetch it"), entry.full_name)
    return FAILURE if damaged or (missing and arguments.names) else OK


def _check(context: Context, entries: list[Entry], sources: list[Source]) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    places = {source: place_of(source, context.models_dir) for source in sources}
    total_bytes = sum(
        file.stat().st_size for path in set(places.values()) for file in content_files(path)
    )
    console = Console(stderr=True)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total_bytes)
        for source, path in places.items():
            names = [entry.full_name for entry in entries if source in entry.sources]
            checks = verify(source, path, lambda count: bar.advance(task, count))
            rows += [_document(names, check) for check in checks]
    return rows


def _document(names: list[str], check: FileCheck) -> dict[str, Any]:
    return {
        "entries": names,
        "path": str(check.path),
        "size_bytes": check.size_bytes,
        "sha256": check.sha256,
        "compared_with": check.stated_by,
        "fault": check.fault,
    }


def _show(rows: list[dict[str, Any]], missing: list[Entry]) -> None:
    table = Table("file", "size", "sha256", "compared with", "state", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.header != "file"
    for row in rows:
        table.add_row(*map(Text, _cells(row)))
    console = output()
    if rows:
        console.print(table)
    if missing:
        names = ", ".join(entry.full_name for entry in missing)
        console.print(Text(f"not on this disk, or not all of it: {names}"), soft_wrap=True)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    digest = row["sha256"]
    return (
        row["path"],
        size_text(row["size_bytes"]),
        digest[:12] if digest else "",
        row["compared_with"] or "",
        "damaged" if row["fault"] else "whole",
    )
