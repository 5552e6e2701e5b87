"""``models add``: an entry at the end of an operator's catalogue file; the rest stays as it is."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experimance_controlnet.catalog.disk import flush
from experimance_controlnet.catalog.entries import Entry, entries_of
from experimance_controlnet.catalog.location import LocalPlace, locate
from experimance_controlnet.catalog.lock import file_lock
from experimance_controlnet.catalog.registry import merged_tables, parse_catalog
from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.catalog.schema import BUILT_IN
from experimance_controlnet.commands.context import OK, print_json
from experimance_controlnet.errors import CatalogError, ModelFileError, SettingsError

_BARE_KEY = re.compile("[A-Za-z0-9_-]+")


def run(arguments: argparse.Namespace) -> int:
    """Append the entry; the file is replaced at once, and only by a valid one."""
    if arguments.catalog is None or arguments.catalog in BUILT_IN:
        raise SettingsError("say with --catalog FILE which catalogue of yours is meant")
    path = Path(arguments.catalog).resolve()  # a link stays one
    full_name = f"{arguments.table}.{arguments.name}"
    text = _toml(arguments.table, arguments.name, _entry(arguments))
    with file_lock(path.with_name(f".{path.name}.lock"), lambda: None):
        content = _with_entry(path, arguments.table, arguments.name, text)
        _replace(path, content)
    if arguments.json:
        print_json({"catalog": str(path), "added": full_name})
    else:
        print(f"{full_name}: added to {path}")
    return OK


def _with_entry(path: Path, table: str, name: str, text: str) -> bytes:
    """The file's content with the entry; checked as far as this disk can tell."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CatalogError(
            f'{path} does not exist; begin it with the line: extends = "{BUILT_IN[0]}"'
        ) from error
    if name in merged_tables(content, path).get(table, {}):
        raise CatalogError(f"{path}: has {table}.{name} already; change it in the file")
    ending = b"" if not content or content.endswith(b"\n") else b"\n"
    try:
        content += ending + (b"\n" if content else b"") + text.encode()
    except UnicodeEncodeError as error:
        raise SettingsError("what is to be added is not text") from error
    catalog = parse_catalog(content, path)
    [added] = [one for one in entries_of(catalog) if (one.kind, one.name) == (table, name)]
    _check_local(added)
    return content


def _check_local(entry: Entry) -> None:
    for source in () if entry.kind == "eras" else entry.sources:
        place = locate(source)
        if not isinstance(place, LocalPlace):
            continue
        if not place.path.exists():
            raise ModelFileError(
                f"{place.path} does not exist; a path is relative to the catalogue file"
            )
        if place.path.is_file():
            verify_safetensors(place.path)


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
        try:
            new.write(content)
            new.flush()
            shutil.copymode(path, new.name)
            os.fsync(new.fileno())
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise
    flush(path.parent)


def _entry(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of the entry, in the order in which they are written."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    entry: dict[str, Any] = {
        key: given[key] for key in ("steps", "cfg", "scheduler", "weight") if key in given
    }
    if "source" in given:
        parts = {"uri": given["source"], "files": given.get("file")}
        parts |= {key: given.get(key) for key in ("sha256", "size_bytes")}
        entry["source"] = {key: value for key, value in parts.items() if value is not None}
    if "base_source" in given:
        files = {"files": given["base_file"]} if "base_file" in given else {}
        entry["base_source"] = {"uri": given["base_source"], **files}
    elif "base_file" in given:
        raise SettingsError("--base-file is for --base-source")
    if "scheduler_config" in given:
        entry["scheduler_config"] = _pairs(given["scheduler_config"], _scalar)
    for flag, key in (("adapter", "adapters"), ("alternative", "alternative")):
        if flag in given:
            entry[key] = _pairs(given[flag], _number)
    return entry


def _pairs(texts: Sequence[str], read: Any) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not key or not sign or key in pairs:
            raise SettingsError(f"{text!r}: must be NAME=VALUE, and each NAME once")
        pairs[key] = read(value)
    return pairs


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SettingsError(f"{text!r}: must be a number") from error


def _scalar(text: str) -> Any:
    """A number, true or false as TOML reads them; everything else is text."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _toml(table: str, name: str, entry: Mapping[str, Any]) -> str:
    lines = [f"[{table}.{_key(name)}]"]
    lines += [f"{key} = {_value(value)}" for key, value in entry.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    match value:
        case dict():
            pairs = ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items())
            return f"{{ {pairs} }}"
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case str():
            return _quoted(value)
        case bool():
            return "true" if value else "false"
        case _:
            return repr(value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    """JSON's escapes are all TOML's; it wants one more."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
