from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest
import structlog

from experimance_controlnet.logs import FILE_BYTES, configure_logging, errors_log

CANARY = "canary-77"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.configure(**before)


@pytest.fixture
def model_log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


@pytest.fixture
def console(model_log: Path) -> io.StringIO:
    stream = io.StringIO()
    configure_logging("info", model_log, stream)
    return stream


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fail() -> None:
    secret = CANARY
    raise ValueError("broken" if secret else "")


def log_failure(level: str) -> None:
    try:
        fail()
    except ValueError as error:
        getattr(structlog.get_logger(), level)("it_failed", exc_info=error, request_id="r1")


def test_an_event_goes_to_console_and_file(console: io.StringIO, model_log: Path) -> None:
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("here").info("model_loaded", model="base", load_s=1.5)
    [line] = console.getvalue().splitlines()
    for part in ("info", "model_loaded", "model=base", "load_s=1.5", "request_id=r1"):
        assert part in line
    assert "\x1b" not in line
    [event] = events(model_log)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "model_loaded",
        "level": "info",
        "logger": "here",
        "model": "base",
        "load_s": 1.5,
        "request_id": "r1",
    }
    assert errors_log(model_log).read_text() == ""


def test_colours_are_for_terminals(model_log: Path) -> None:
    terminal = Terminal()
    configure_logging("info", model_log, terminal)
    structlog.get_logger().info("hello")
    assert "\x1b[" in terminal.getvalue()
    assert "\x1b" not in model_log.read_text()


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", 4), ("info", 3), ("WARNING", 2), ("error", 1), ("critical", 0)],
)
def test_levels(model_log: Path, level: str, shown: int) -> None:
    console = io.StringIO()
    configure_logging(level, model_log, console)
    log = structlog.get_logger()
    for say in (log.debug, log.info, log.warning, log.error):
        say("said")
    assert len(events(model_log)) == len(console.getvalue().splitlines()) == shown


def test_errors_also_have_a_file_of_their_own(console: io.StringIO, model_log: Path) -> None:
    log = structlog.get_logger()
    for say in (log.info, log.warning, log.error, log.critical):
        say("said")
    assert errors_log(model_log).name == "server.errors.log"
    assert [event["level"] for event in events(errors_log(model_log))] == ["error", "critical"]
    assert len(events(model_log)) == 4


def test_a_traceback_is_one_field_without_locals(console: io.StringIO, model_log: Path) -> None:
    log_failure("error")
    [event] = events(model_log)
    assert event["exception"].startswith("Traceback (most recent call last):")
    assert event["exception"].endswith("ValueError: broken")
    text = console.getvalue()
    assert "ValueError: broken" in text
    assert len(text.splitlines()) > 3
    for output in (text, model_log.read_text(), errors_log(model_log).read_text()):
        assert f'"{CANARY}"' not in output
        assert f"'{CANARY}'" not in output


def test_below_error_a_traceback_does_not_fill_the_console(
    console: io.StringIO, model_log: Path
) -> None:
    log_failure("warning")
    [line] = console.getvalue().splitlines()
    assert "ValueError('broken')" in line
    assert "Traceback" in events(model_log)[0]["exception"]


@pytest.mark.parametrize("text", ["two\nlines", "carriage\rreturn", "a\r\n[error] forged"])
def test_nobody_writes_a_second_line(console: io.StringIO, model_log: Path, text: str) -> None:
    structlog.get_logger().info(text, field=text)
    logging.getLogger("other").warning(text)
    assert len(console.getvalue().splitlines()) == 2
    assert len(model_log.read_text().splitlines()) == 2
    assert events(model_log)[0]["field"] == text


def test_other_libraries_and_warnings_take_the_same_way(
    console: io.StringIO, model_log: Path
) -> None:
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("httpx").info("GET https://x.test/?token=%s", CANARY)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", UserWarning, stacklevel=1)
    started, warned = events(model_log)
    assert (started["event"], started["logger"]) == (
        *("Started server process [7]", "uvicorn.error"),
    )
    assert (warned["level"], warned["logger"]) == ("warning", "py.warnings")
    assert CANARY not in console.getvalue() + model_log.read_text()


def test_what_json_cannot_hold_does_not_break_a_line(console: io.StringIO, model_log: Path) -> None:
    structlog.get_logger().info("odd", path=Path("/x"), text="\ud800", nested={"a": {1}})
    [event] = events(model_log)
    assert event["text"] == "\ud800"


def test_files_are_rotated(console: io.StringIO, model_log: Path) -> None:
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, RotatingFileHandler)]
    assert [(h.maxBytes, h.backupCount) for h in handlers] == [(FILE_BYTES, 5)] * 2
    assert FILE_BYTES == 20 * 1024 * 1024


def test_configuring_again_does_not_double(console: io.StringIO, model_log: Path) -> None:
    configure_logging("info", model_log, console)
    structlog.get_logger().info("once")
    assert len(events(model_log)) == 1
