"""``models fetch``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from experimance_controlnet.catalog.entries import Entry
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.catalog.web import tokens_of
from experimance_controlnet.commands.bars import TransferBars, show_events
from experimance_controlnet.commands.context import FAILURE, OK, Context, complain, print_json
from experimance_controlnet.errors import ModelFileError, NotFoundUpstreamError, SettingsError


def run(context: Context, arguments: argparse.Namespace) -> int:
    """Fetch the entries one after the other; one that fails does not stop the rest."""
    if bool(arguments.names) == arguments.all:
        raise SettingsError("name the entries to fetch, or say --all")
    entries = context.entries() if arguments.all else context.select(arguments.names)
    store = ModelStore(context.models_dir, tokens=tokens_of(os.environ))
    bars = TransferBars(store)
    show_events(bars.console)
    fetcher = _Fetcher(bars)
    rows = []
    for entry in entries:
        rows.append(row := fetcher.fetch(entry))
        if not context.as_json and row["error"] is None:
            which = " (its alternative)" if row["alternative"] else ""
            print(f"{entry.full_name}{which}: on disk")
    if context.as_json:
        print_json({"models_dir": str(context.models_dir), "entries": rows})
    return OK if all(row["error"] is None for row in rows) else FAILURE


class _Fetcher:
    """Asks for each source once, even where it fails and several entries need it."""

    def __init__(self, bars: TransferBars) -> None:
        self._bars = bars
        self._faults: dict[Source, ModelFileError] = {}

    def fetch(self, entry: Entry) -> dict[str, Any]:
        """As the server would for a request: an era's alternative where its own do not exist."""
        uses_alternative = False
        fault = self._bring(entry.sources)
        if isinstance(fault, NotFoundUpstreamError) and entry.alternative is not None:
            uses_alternative, fault = True, self._bring(entry.alternative)
        if fault is not None:
            complain(fault, entry.full_name)
        return {
            "kind": entry.kind,
            "name": entry.name,
            "alternative": uses_alternative,
            "error": fault and {"code": fault.code, "message": fault.message},
        }

    def _bring(self, sources: Sequence[Source]) -> ModelFileError | None:
        for source in sources:
            if source not in self._faults:
                try:
                    self._bars.fetch(source)
                except ModelFileError as error:
                    self._faults[source] = error
            if source in self._faults:
                return self._faults[source]
        return None
