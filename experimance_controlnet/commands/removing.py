"""``models remove``."""

from __future__ import annotations

import argparse
from typing import Any

from experimance_controlnet.catalog.entries import Entry
from experimance_controlnet.catalog.location import place_of, without_query
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.commands.context import (
    FAILURE,
    OK,
    Context,
    complain,
    print_json,
    size_text,
)
from experimance_controlnet.errors import FileInUseError, ModelFileError, SettingsError


def run(context: Context, arguments: argparse.Namespace) -> int:
    """Remove what only the named entries need; what others share stays.

    An entry of which nothing can be removed for that reason is a failure. Eras are not counted as
    sharers: they have no files of their own, and a LoRA comes back when an era needs it.
    """
    entries = context.select(arguments.names)
    for entry in entries:
        if entry.kind == "eras":
            loras = ", ".join(use.lora for use in context.catalog.eras[entry.name].adapters)
            raise SettingsError(f"{entry.full_name} has no files of its own; its LoRAs: {loras}")
    store = ModelStore(context.models_dir)
    rows = [_remove(context, store, entry, entries) for entry in entries]
    if context.as_json:
        freed_bytes = sum(row["freed_bytes"] for row in rows)
        print_json(
            {"models_dir": str(context.models_dir), "freed_bytes": freed_bytes, "entries": rows}
        )
    return OK if all(row["error"] is None for row in rows) else FAILURE


def _remove(
    context: Context, store: ModelStore, entry: Entry, named: list[Entry]
) -> dict[str, Any]:
    freed_bytes, kept, fault = 0, dict[str, list[str]](), None
    for source in entry.sources:
        if sharers := _sharers(context, source, named):
            kept[without_query(source.uri)] = sharers
            continue
        try:
            freed_bytes += store.remove(source)
        except ModelFileError as error:
            fault = fault or error
    if len(kept) == len(entry.sources):
        sharers = sorted(set().union(*kept.values()))
        fault = FileInUseError(f"its files are also those of {', '.join(sharers)}; name them too")
    if fault is not None:
        complain(fault, entry.full_name)
    elif not context.as_json:
        print(f"{entry.full_name}: {size_text(freed_bytes)} freed")
        for uri, sharers in kept.items():
            print(f"  kept for {', '.join(sharers)}: {uri}")
    return {
        "kind": entry.kind,
        "name": entry.name,
        "freed_bytes": freed_bytes,
        "kept": [{"uri": uri, "needed_by": names} for uri, names in kept.items()],
        "error": fault and {"code": fault.code, "message": fault.message},
    }


def _sharers(context: Context, source: Source, named: list[Entry]) -> list[str]:
    """The entries beside the named ones that have a file or folder at this place."""
    place = place_of(source, context.models_dir)
    return [
        entry.full_name
        for entry in context.entries()
        if entry.kind != "eras"
        and entry not in named
        and any(place_of(other, context.models_dir) == place for other in entry.sources)
    ]
