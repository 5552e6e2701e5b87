"""``controlnet-worker models``: what the catalogue holds, and its files on this disk."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn, cast, get_args

from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.schema import BUILT_IN
from experimance_controlnet.catalog.specs import SchedulerName
from experimance_controlnet.commands.context import (
    FAILURE,
    INTERRUPTED,
    USAGE,
    Context,
    complain,
)
from experimance_controlnet.errors import (
    CatalogError,
    ModelFileError,
    SettingsError,
    UnknownNameError,
    WorkerError,
)
from experimance_controlnet.folders import default_models_dir

_PROG = "controlnet-worker models"
_EXIT = "exit status: 0 done; 1 failure; 2 wrong usage or catalogue; 130 interrupted"
_NAMES = "entries, as NAME or KIND.NAME (models.lightning)"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status. Raises SystemExit for --help and wrong flags."""
    arguments = parser().parse_args(argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except (SettingsError, CatalogError, UnknownNameError) as error:
        complain(error)
        return USAGE
    except WorkerError as error:
        complain(error)
        return FAILURE
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:
        complain(ModelFileError(f"{error.filename or 'the disk'}: {error.strerror or error}"))
        return FAILURE
    except KeyboardInterrupt:
        print("controlnet-worker: interrupted; a fetch goes on where it stopped", file=sys.stderr)
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # a return would wait for the threads of a transfer
    return status


def _run(arguments: argparse.Namespace) -> int:
    module = import_module(f"experimance_controlnet.commands.{arguments.module}")
    if arguments.module == "adding":
        add = cast(Callable[[argparse.Namespace], int], module.run)
        return add(arguments)
    context = Context(load_catalog(arguments.catalog), _models_dir(arguments), arguments.json)
    run = cast(Callable[[Context, argparse.Namespace], int], module.run)
    return run(context, arguments)


def _models_dir(arguments: argparse.Namespace) -> Path:
    named: str | None = arguments.models_dir
    if named is None:
        named = os.environ.get("MODELS_DIR")
    if named is None:
        return default_models_dir()
    if not named.strip():
        raise SettingsError("MODELS_DIR (--models-dir): must not be empty")
    return Path(named)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"controlnet-worker: usage: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Of the arguments behind ``models``."""
    top = _Parser(
        prog=_PROG,
        description="What the catalogue holds, and its files on this disk.",
        epilog=_EXIT,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    common = _common()

    def command(name: str, module: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, epilog=_EXIT, parents=[common], allow_abbrev=False
        )
        made.set_defaults(module=module)
        return made

    listing = command("list", "listing", "Show entries: settings, size, hash, on disk or not.")
    listing.add_argument("names", nargs="*", metavar="NAME", help=f"{_NAMES}; default: all")

    fetching = command("fetch", "fetching", "Bring the files of entries onto this disk.")
    fetching.add_argument("names", nargs="*", metavar="NAME", help=_NAMES)
    fetching.add_argument("--all", action="store_true", help="everything in the catalogue")

    checking = command("verify", "checking", "Read the files on this disk: length, header, sha256.")
    checking.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{_NAMES}; default: all that is on this disk"
    )

    removing = command("remove", "removing", "Remove the files of entries from this disk.")
    removing.add_argument("names", nargs="+", metavar="NAME", help=_NAMES)

    adding = commands.add_parser(
        "add",
        help="Add an entry to a catalogue file of your own.",
        description="Add an entry to a catalogue file of your own; it is appended, the rest of "
        "the file stays as it is.",
        epilog='A file begins with the line: extends = "experimance"',
        allow_abbrev=False,
    )
    _add_kinds(adding)
    return top


def _common() -> _Parser:
    common = _Parser(add_help=False)
    common.add_argument(
        "--catalog",
        metavar="FILE|NAME",
        default=os.environ.get("MODEL_CATALOG") or BUILT_IN[0],
        help=f"{', '.join(BUILT_IN)} or a TOML file; default: MODEL_CATALOG, else {BUILT_IN[0]}",
    )
    common.add_argument(
        "--models-dir",
        metavar="FOLDER",
        help="folder of the model files; default: MODELS_DIR, else the server's default",
    )
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return common


def _add_kinds(adding: argparse.ArgumentParser) -> None:
    kinds = adding.add_subparsers(metavar="KIND", required=True)

    def kind(name: str, table: str, text: str) -> argparse.ArgumentParser:
        made = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(module="adding", table=table)
        made.add_argument("name", metavar="NAME", help="what clients send")
        made.add_argument(
            "--catalog", metavar="FILE", default=os.environ.get("MODEL_CATALOG"), help="the file"
        )
        made.add_argument("--json", action="store_true", help="one JSON document on stdout")
        return made

    def source(made: argparse.ArgumentParser, *, folder: bool, file: bool) -> None:
        made.add_argument(
            "--source",
            required=True,
            metavar="URI",
            help="https://..., gs://bucket/object, hf://owner/repo[/file][@revision], or a path "
            "relative to the catalogue file",
        )
        if folder:
            made.add_argument("--file", action="append", metavar="PATTERN", help=_PATTERN_HELP)
        if file:
            made.add_argument("--sha256", metavar="HEX", help="of the one file")
            made.add_argument("--size-bytes", type=int, metavar="N", help="of the one file")

    model = kind("model", "models", "An SDXL checkpoint.")
    source(model, folder=True, file=True)
    model.add_argument(
        "--base-source", metavar="URI", help="a diffusers folder that supplies what source lacks"
    )
    model.add_argument("--base-file", action="append", metavar="PATTERN", help=_PATTERN_HELP)
    model.add_argument("--steps", type=int, required=True, metavar="N")
    model.add_argument("--cfg", type=float, required=True, metavar="X")
    model.add_argument("--scheduler", choices=get_args(SchedulerName), required=True)
    model.add_argument(
        "--scheduler-config",
        action="append",
        metavar="KEY=VALUE",
        help="a number, true, false or text",
    )
    source(kind("controlnet", "controlnets", "A depth ControlNet."), folder=True, file=False)
    lora = kind("lora", "loras", "A LoRA.")
    source(lora, folder=False, file=True)
    lora.add_argument("--weight", type=float, metavar="X", help="default: 1.0")
    era = kind("era", "eras", "An era: LoRAs with their weights.")
    era.add_argument("--adapter", action="append", required=True, metavar="LORA=WEIGHT")
    era.add_argument(
        "--alternative",
        action="append",
        metavar="LORA=WEIGHT",
        help="used where the origin does not have one of the adapters",
    )


_PATTERN_HELP = "the part of a Hub folder that is needed; may be repeated"
