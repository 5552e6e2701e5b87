"""The console script ``controlnet-worker``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experimance_controlnet import __version__

HELP = """\
usage: controlnet-worker COMMAND ...

Makes images steered by depth maps, over HTTP.

commands:
  serve     start the model server; `serve --help` lists its flags
  models    list, fetch, verify, remove and add models; `models --help`
  version   print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 on failure, 2 for wrong usage."""
    match sys.argv[1:] if argv is None else list(argv):
        case ["serve", *rest]:
            from experimance_controlnet import model_server  # each command imports only its own

            model_server.main(rest)
        case ["models", *rest]:
            from experimance_controlnet.commands import models

            return models.main(rest)
        case ["version"] | ["--version"]:
            print(__version__)
        case ["help"] | ["-h"] | ["--help"]:
            print(HELP, end="")
        case wrong:
            what = f"there is no command {wrong[0]!r}" if wrong else "a command is missing"
            print(f"controlnet-worker: {what}; see controlnet-worker --help", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
