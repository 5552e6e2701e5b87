"""Starts the model server, as a script or as the module ``experimance_controlnet.model_server``.

Flags and environment variables are those of ``settings.py``; nothing else is decided here.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside this file first; the package lies one above.
if not __package__ and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(sys.path[0]).resolve().parent)

import errno
import gc
import json
import logging
import os
import shlex
import signal
import socket
from collections.abc import MutableMapping, Sequence
from functools import partial
from types import FrameType
from typing import NoReturn

import structlog

from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.catalog.web import tokens_of
from experimance_controlnet.engine.runner import Runner
from experimance_controlnet.errors import CatalogError, SettingsError
from experimance_controlnet.logs import configure_logging
from experimance_controlnet.server.listener import open_socket, url_of
from experimance_controlnet.settings import Settings, load_settings

log = structlog.get_logger()

FAILURE, BAD_SETTINGS = 1, 2
"""Exit statuses."""
EXAMPLE = {
    "prompt": "A majestic mountain landscape",
    "negative_prompt": "blurry, low quality",
    "mock_depth": True,
    "model": "lightning",
    "era": "wilderness",
    "steps": 6,
    "cfg": 2.0,
    "width": 1024,
    "height": 1024,
    "response_format": "binary",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the server and end the process: 0 when told to stop, 1 on failure, 2 for bad settings."""
    try:
        settings = load_settings(sys.argv[1:] if argv is None else argv)
        catalog = load_catalog(settings.model_catalog)
        _check_preload(settings, catalog)
    except SettingsError as error:
        _refuse(error.message, BAD_SETTINGS)
    except CatalogError as error:
        _refuse(f"MODEL_CATALOG (--model-catalog): {error.message}", BAD_SETTINGS)
    configure_logging(settings.log_level, settings.model_log)
    keep_kernels(settings.models_dir, os.environ)
    for fallback in settings.fallbacks:
        log.warning(
            "folder_fallback",
            variable=fallback.variable,
            wanted=str(fallback.wanted),
            used=str(fallback.used),
        )
    try:
        listener = open_socket(settings.model_server_host, settings.model_server_port)
    except SettingsError as error:
        cause = error.__cause__
        in_use = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
        _refuse(error.message, FAILURE if in_use else BAD_SETTINGS)  # in use: that may pass
    for number in (signal.SIGINT, signal.SIGTERM):  # until the server has its own handlers
        signal.signal(number, _stop_before_start)
    status = _serve(settings, catalog, listener)
    # Not sys.exit: that waits for, or crashes on, a thread that still fetches or reads a model.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def keep_kernels(models_dir: Path, environment: MutableMapping[str, str]) -> None:
    """Let Triton keep what it compiles on the volume of the models: a new box compiles nothing.

    Triton reads the variable when it is imported; the operator's own value wins.
    """
    folder = models_dir.absolute() / ".cache" / "triton"
    environment.setdefault("TRITON_CACHE_DIR", str(folder))


def _serve(settings: Settings, catalog: Catalog, listener: socket.socket) -> int:
    # Imports make hundreds of thousands of objects, and all of them stay. Looking for garbage among
    # them again and again took up to a fifth of their time.
    gc.disable()
    # Only now: --help and a bad flag should not wait for them.
    from experimance_controlnet.engine.engine import Engine
    from experimance_controlnet.engine.late import LateRunner
    from experimance_controlnet.engine.precompile import compile_in_background
    from experimance_controlnet.server.app import create_app
    from experimance_controlnet.server.serve import DEATH_LIMIT_S, Server, exit_after

    if settings.model_device != "cpu":
        compile_in_background(settings.precision)  # goes on beside the imports that follow
    store = ModelStore(settings.models_dir, tokens=tokens_of(os.environ))
    make = partial(_make_runner, settings, catalog, store)
    runner = LateRunner(make, settings.model_device, settings.precision, settings.memory_tier)
    engine = Engine(
        runner,
        queue_capacity=settings.queue_capacity,
        max_rows=settings.max_batch_rows,
        watchdog_s=settings.watchdog_s,
        on_start=runner.open,
        on_death=partial(exit_after, DEATH_LIMIT_S),
    )
    app = create_app(settings, catalog, store, engine)
    url = settings.explicit_url or url_of(listener)

    def announce() -> None:
        log.info("server_listening", url=url, model_catalog=catalog.name)
        if sys.stdout.isatty():
            sys.stdout.write(f"\n{curl_line(url)}\n\n")

    server = Server(app, announce)
    server.run(sockets=[listener])
    return server.exit_status


def _make_runner(settings: Settings, catalog: Catalog, store: ModelStore) -> Runner:
    """Imports torch and the model libraries, which takes seconds; on the engine's thread."""
    from experimance_controlnet.engine.sdxl import SdxlRunner

    try:
        return SdxlRunner(
            catalog,
            store,
            settings.model_device,
            settings.precision,
            settings.memory_tier,
            settings.memory_limit_bytes,
        )
    except SettingsError as error:  # no exception here would end the process with this status
        sys.stderr.write(_for_operator(error.message))
        os._exit(BAD_SETTINGS)
    finally:
        # what is here now stays: a full collection need not stop all threads to go through it
        gc.freeze()
        gc.enable()


def curl_line(url: str) -> str:
    """Makes an image when pasted into a shell."""
    body = shlex.quote(json.dumps(EXAMPLE))
    return f"curl -sS {url}/generate -H 'Content-Type: application/json' -d {body} -o image.png"


def _check_preload(settings: Settings, catalog: Catalog) -> None:
    for name in settings.preload_models:
        if name not in catalog.models:
            raise SettingsError(
                f"PRELOAD_MODEL (--preload-model): the catalogue {catalog.name} has no model "
                f"{name!r}; it has {', '.join(catalog.models)}"
            )


def _stop_before_start(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(0)  # an exception in the middle of an import would come out as another one, or not


def _refuse(message: str, status: int) -> NoReturn:
    """One line for the operator, who is the only one to read it: the log may not exist yet."""
    sys.stderr.write(_for_operator(message))
    sys.exit(status)


def _for_operator(message: str) -> str:
    return f"model_server: {message}\n"


if __name__ == "__main__":
    main()
