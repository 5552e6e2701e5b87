"""``models list``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from experimance_controlnet.catalog.entries import Entry
from experimance_controlnet.catalog.hashes import ContentHashes
from experimance_controlnet.catalog.inventory import Found, glance
from experimance_controlnet.catalog.location import place_of, without_query
from experimance_controlnet.catalog.specs import AdapterUse, Catalog, Source
from experimance_controlnet.commands.context import OK, Context, output, print_json, size_text


def run(context: Context, arguments: argparse.Namespace) -> int:
    """Show the entries, all of them where none is named. Reads no weights."""
    names = arguments.names
    entries = context.select(names or [entry.full_name for entry in context.entries()])
    hashes = ContentHashes()
    sources = {source for entry in entries for source in entry.sources}
    found = {source: glance(source, context.models_dir, hashes) for source in sources}
    if context.as_json:
        rows = [_document(entry, context, found) for entry in entries]
        print_json(
            {
                "catalog": context.catalog.name,
                "models_dir": str(context.models_dir),
                "entries": rows,
            }
        )
        return OK
    table = Table("entry", "on disk", "size", "sha256", "settings", "from", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.header in ("entry", "on disk", "size", "sha256")
    for entry in entries:
        table.add_row(*map(Text, _cells(entry, context.catalog, found)))
    console = output()
    console.print(table)
    console.print(
        Text(f"catalogue {context.catalog.name}, files in {context.models_dir}"), soft_wrap=True
    )
    return OK


def _cells(entry: Entry, catalog: Catalog, found: dict[Source, Found | None]) -> Sequence[str]:
    there = [found[source] is not None for source in entry.sources]
    on_disk = "yes" if all(there) else "in part" if any(there) else "no"
    main = found[entry.sources[0]]
    is_era = entry.kind == "eras"
    digest = None if is_era else main.sha256 if main else entry.sources[0].sha256
    return (
        entry.full_name,
        on_disk,
        size_text(_size(entry, found)),
        digest[:12] if digest else "",
        _settings_text(entry, catalog),
        "" if is_era else "\n".join(without_query(source.uri) for source in entry.sources),
    )


def _size(entry: Entry, found: dict[Source, Found | None]) -> int | None:
    sizes = [
        one.size_bytes if (one := found[source]) else source.size_bytes for source in entry.sources
    ]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _document(entry: Entry, context: Context, found: dict[Source, Found | None]) -> dict[str, Any]:
    sources = []
    for source in entry.sources:
        one = found[source]
        sources.append(
            {
                "uri": without_query(source.uri),
                "path": str(place_of(source, context.models_dir)),
                "on_disk": one is not None,
                "size_bytes": one.size_bytes if one else source.size_bytes,
                "sha256": one.sha256 if one else source.sha256,
            }
        )
    return {
        "kind": entry.kind,
        "name": entry.name,
        **_settings(entry, context.catalog),
        "on_disk": all(source["on_disk"] for source in sources),
        "size_bytes": _size(entry, found),
        "sources": sources,
    }


def _settings(entry: Entry, catalog: Catalog) -> dict[str, Any]:
    match entry.kind:
        case "models":
            model = catalog.models[entry.name]
            return {
                "steps": model.steps,
                "cfg": model.cfg,
                "scheduler": model.scheduler,
                "scheduler_config": dict(model.scheduler_config),
            }
        case "loras":
            return {"weight": catalog.loras[entry.name].weight}
        case "eras":
            era = catalog.eras[entry.name]
            return {
                "adapters": _weights(era.adapters),
                "alternative": None if era.alternative is None else _weights(era.alternative),
            }
        case _:
            return {}


def _settings_text(entry: Entry, catalog: Catalog) -> str:
    match entry.kind:
        case "models":
            model = catalog.models[entry.name]
            return f"{model.steps} steps, cfg {model.cfg:g}, {model.scheduler}"
        case "loras":
            return f"weight {catalog.loras[entry.name].weight:g}"
        case "eras":
            era = catalog.eras[entry.name]
            text = _uses_text(era.adapters)
            return f"{text}, else {_uses_text(era.alternative)}" if era.alternative else text
        case _:
            return ""


def _weights(uses: Sequence[AdapterUse]) -> dict[str, float]:
    return {use.lora: use.weight for use in uses}


def _uses_text(uses: Sequence[AdapterUse]) -> str:
    return " + ".join(f"{use.lora} {use.weight:g}" for use in uses)
