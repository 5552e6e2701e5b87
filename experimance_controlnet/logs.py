"""Where log events go: the console for people, MODEL_LOG for machines, errors to one of their own.

Every event is one line; only an error's traceback spans several, and only on the console.
Tracebacks never hold local variables: those would hold prompts and secrets.
"""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

FILE_BYTES = 20 * 1024 * 1024
FILES_KEPT = 5
# What they say at info is about every connection or file, with the addresses in full.
_TALKATIVE = ("httpx", "httpcore", "filelock", "huggingface_hub", "PIL", "asyncio")
# What these say as a warning can hold an address with its query, and so a token.
_INDISCREET = ("urllib3",)


def configure_logging(level: str, model_log: Path, console: TextIO = sys.stderr) -> None:
    """Route structlog, the standard library's logging and warnings to console and files.

    ``level`` is a name in either case; the folder of ``model_log`` exists. May be called again.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    for handler in _handlers(model_log, console, shared):
        root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _INDISCREET:
        logging.getLogger(name).setLevel(logging.ERROR)


def errors_log(model_log: Path) -> Path:
    """The file that holds the errors only."""
    return model_log.with_name(f"{model_log.stem}.errors.log")


def _handlers(model_log: Path, console: TextIO, shared: list[Processor]) -> list[logging.Handler]:
    for_machines = _formatter(
        shared,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    )
    for_people = _formatter(
        shared,
        _keep_to_one_line,
        structlog.dev.ConsoleRenderer(
            colors=console.isatty(),
            exception_formatter=structlog.dev.plain_traceback,
        ),
    )
    stream = logging.StreamHandler(console)
    stream.setFormatter(for_people)
    everything = _rotating(model_log, for_machines)
    errors = _rotating(errors_log(model_log), for_machines)
    errors.setLevel(logging.ERROR)
    return [stream, everything, errors]


def _formatter(shared: list[Processor], *last: Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )


def _rotating(path: Path, formatter: logging.Formatter) -> logging.Handler:
    handler = RotatingFileHandler(
        path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"
    )
    handler.setFormatter(formatter)
    return handler


def _keep_to_one_line(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """For the console: escape line breaks, and shorten what is no error to its exception's name."""
    event["event"] = str(event["event"]).replace("\r", "\\r").replace("\n", "\\n")
    if event["level"] not in ("error", "critical") and event.get("exc_info"):
        exc_info = event.pop("exc_info")
        error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
        event["error"] = repr(error if isinstance(error, BaseException) else sys.exception())
    return event
