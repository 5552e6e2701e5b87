"""From a TOML file to a Catalog: every key checked, every name that one entry uses of another.

``schema.py`` says what a file may hold.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experimance_controlnet.catalog.location import HubPlace, LocalPlace, WebFile, locate
from experimance_controlnet.catalog.schema import (
    BUILT_IN,
    CatalogRows,
    ControlNetRow,
    EraRow,
    HeadRow,
    LoraRow,
    ModelRow,
    Row,
    SourceRow,
)
from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.defaults import DEFAULT_CONTROLNET
from experimance_controlnet.errors import CatalogError

_HEAD = HeadRow.model_fields.keys()
_DATA_FOLDER = Path(__file__).parent / "data"


def load_catalog(which: str) -> Catalog:
    """The built-in catalogue of that name, or the one in the TOML file at that path.

    Raises CatalogError, one line that names the file, the line or key, and what is wrong.
    """
    path = _DATA_FOLDER / f"{which}.toml" if which in BUILT_IN else Path(which)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CatalogError(
            f"{path}: {reason}; a catalogue is {' or '.join(BUILT_IN)} or a TOML file"
        ) from error
    return parse_catalog(content, path)


def parse_catalog(content: bytes, path: Path) -> Catalog:
    """The catalogue that ``content`` would be as the file ``path``; raises as load_catalog does."""
    with _faults_of(path):
        rows = CatalogRows.model_validate(_tables(content), context=path.parent.absolute())
        _check_references(rows)
    return rows.record(path.stem)


def merged_tables(content: bytes, path: Path) -> dict[str, Any]:
    """The tables of a file and of what it extends, not yet checked; raises as load_catalog does."""
    with _faults_of(path):
        return _tables(content)


def _tables(content: bytes) -> dict[str, Any]:
    tables = tomllib.loads(content.decode())
    head = HeadRow.model_validate({key: tables.pop(key) for key in _HEAD & tables.keys()})
    return _extended(head, tables)


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """Name the file in every error."""
    try:
        yield
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: not TOML: {error}") from error
    except RecursionError as error:  # the library's parser calls itself
        raise CatalogError(f"{path}: arrays or tables are nested too deeply") from error
    except ValidationError as error:
        raise CatalogError(f"{path}: {_first_fault(error)}") from error
    except CatalogError as error:
        raise CatalogError(f"{path}: {error.message}") from error


def _extended(head: HeadRow, own: dict[str, Any]) -> dict[str, Any]:
    """The tables of a file put over those that it extends: an entry's keys replace those of the
    entry of the same name, one by one.
    """
    if head.extends is None:
        if head.remove:
            raise CatalogError("remove: there is nothing to remove from; set extends")
        return own
    tables = tomllib.loads((_DATA_FOLDER / f"{head.extends}.toml").read_text("utf-8"))
    for kind, names in head.remove.items():
        for name in names:
            if tables[kind].pop(name, None) is None:
                raise CatalogError(f"remove.{kind}: {head.extends} has no {name!r}")
    for table, entries in own.items():
        if table in tables and isinstance(entries, dict):
            for name, entry in entries.items():
                known = tables[table].get(name, {})
                tables[table][name] = known | entry if isinstance(entry, dict) else entry
        else:  # wrong, as the validation will say
            tables[table] = entries
    return tables


def _check_references(rows: CatalogRows) -> None:
    _check_eras(rows)
    _check_sources(rows)
    if rows.controlnets and DEFAULT_CONTROLNET not in rows.controlnets:
        raise CatalogError(
            f"controlnets: none is called {DEFAULT_CONTROLNET}, which requests use that name none; "
            "give one this name"
        )


def _check_eras(rows: CatalogRows) -> None:
    for era, row in rows.eras.items():
        if era in rows.loras:
            raise CatalogError(f"eras.{era}: a LoRA has this name, and every LoRA is an era too")
        for key, uses in (("adapters", row.adapters), ("alternative", row.alternative or {})):
            for lora in uses:
                if lora not in rows.loras:
                    raise CatalogError(
                        f"eras.{era}.{key}.{lora}: there is no LoRA of this name; add "
                        f"[loras.{lora}], or change or remove the era"
                    )


def _check_sources(rows: CatalogRows) -> None:
    """Folders are folders, files files, and one file is not stated to be two different ones."""
    folders = {f"controlnets.{name}.source": row.source for name, row in rows.controlnets.items()}
    for name, row in rows.models.items():
        if row.base_source is not None:
            folders[f"models.{name}.base_source"] = row.base_source
    files = {f"loras.{name}.source": row.source for name, row in rows.loras.items()}
    models = {f"models.{name}.source": row.source for name, row in rows.models.items()}
    stated: dict[tuple[str, str], tuple[str, str | int]] = {}  # place, what -> by whom, value
    for key, source in {**models, **folders, **files}.items():
        place = locate(source.record())
        one_file = isinstance(place, WebFile) or (isinstance(place, HubPlace) and place.file)
        if key in folders and one_file:
            raise CatalogError(f"{key}: must be a folder: hf://owner/repo or a local one")
        if key in files and isinstance(place, HubPlace) and not place.file:
            raise CatalogError(f"{key}: must be one file: hf://owner/repo/FILE")
        kept_at = str(place.path if isinstance(place, LocalPlace) else place.keep_at)
        for what, value in (("sha256", source.sha256), ("size_bytes", source.size_bytes)):
            if value is None:
                continue
            by, known = stated.setdefault((kept_at, what), (key, value))
            if value != known:
                raise CatalogError(f"{key}: {what} is not the one of {by}, which is the same file")


def _first_fault(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    location = [str(part) for part in first["loc"] if part != "[key]"]
    key = ".".join(part if part.isprintable() else repr(part) for part in location)
    match first["type"]:
        case "extra_forbidden":
            what = f"unknown key; known here: {', '.join(_known_keys(location))}"
        case "missing":
            what = "is missing"
        case "model_type" | "dict_type":
            what = "must be a table"
        case _:
            what = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(others)} more)" if others else ""
    return f"{key}: {what}{more}"


def _known_keys(location: Sequence[str]) -> Iterable[str]:
    """Of the table that holds the key at ``location``."""
    rows: dict[str, type[Row]] = {
        "models": ModelRow,
        "controlnets": ControlNetRow,
        "loras": LoraRow,
        "eras": EraRow,
    }
    match location:
        case [_]:
            return [*_HEAD, *CatalogRows.model_fields]
        case [kind, _, _]:
            return rows[kind].model_fields
        case _:
            return SourceRow.model_fields
