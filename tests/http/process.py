"""The model server as a process of its own, on the embedded model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import experimance_controlnet

READY_S = 120.0  # two cores, and others beside us
STOP_S = 60.0
FOLDER = Path(experimance_controlnet.__file__).parent


@dataclass
class ServerProcess:
    process: subprocess.Popen[bytes]
    url: str
    model_log: Path
    console: Path

    def ended(self) -> int:
        return self.process.wait(STOP_S)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.model_log.read_text().splitlines()]

    def status(self) -> str:
        try:
            return str(httpx.get(f"{self.url}/checkhealth", timeout=10).json()["status"])
        except httpx.TransportError:
            return "silent"

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while not condition():
            assert self.process.poll() is None, self.console.read_text()
            assert time.monotonic() < deadline, self.console.read_text()
            time.sleep(0.1)


Launch = Callable[..., ServerProcess]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def launcher(folder: Path) -> Iterator[Launch]:
    """``launch(*flags, **variables)``: from inside the package's folder, as the README says.

    Logs and models go to ``folder``; what still runs at the end is killed.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(*flags: str, **variables: str) -> ServerProcess:
        port, model_log, console = free_port(), folder / "server.log", folder / "console.txt"
        environment = os.environ | {
            "MODEL_SERVER_HOST": "127.0.0.1",
            "MODEL_SERVER_PORT": str(port),
            "MODELS_DIR": str(folder / "models"),
            "MODEL_LOG": str(model_log),
            "MODEL_CATALOG": "embedded",
            "MODEL_DEVICE": "cpu",
            **variables,
        }
        with console.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "model_server.py", *flags],
                cwd=FOLDER,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return ServerProcess(process, f"http://127.0.0.1:{port}", model_log, console)

    yield start
    for process in started:
        process.kill()
        process.wait()
