"""Process start to first picture, files in the page cache.

Two ways. ``http``: the model server as its own process, preloading the model, until the first
answer to ``POST /generate`` has arrived; needs FastAPI and uvicorn. ``engine``: this module as a
process (``python -m benchmarks.cold_start CATALOG MODEL``) that makes the same picture without HTTP
and file format. Triton's cache is empty at the first start of each series and warm thereafter.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch

from benchmarks.full_size import FULL, FamilyFiles
from benchmarks.ours import make_runner
from benchmarks.standard_request import standard_request
from benchmarks.timing import progress
from experimance_controlnet.engine.engine import Engine

Result = dict[str, Any]

LIMIT_S = 300.0
POLL_S = 0.05


def measure_cold_starts(
    catalog: Path, model: str, precision: str, side_px: int, starts: int
) -> Result:
    """Seconds of each start, with the ``catalog``'s ``model``. Over HTTP a CPU has fp32 only."""
    how = "http" if _has_server() else "engine"
    times_s = []
    with TemporaryDirectory() as folder:
        environment = os.environ | {
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
            "PRECISION": precision if torch.cuda.is_available() else "auto",
        }
        for _ in range(starts):
            if how == "http":
                seconds = _start_server(catalog, model, side_px, environment, Path(folder))
            else:
                seconds = _start_engine(catalog, model, precision, side_px, environment)
            progress(f"cold start {precision}, {model}, {how}: {seconds:.2f} s")
            times_s.append(round(seconds, 2))
    return {"how": how, "seconds": times_s}


def _has_server() -> bool:
    return all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))


def _start_engine(
    catalog: Path, model: str, precision: str, side_px: int, environment: Mapping[str, str]
) -> float:
    command = [sys.executable, "-m", "benchmarks.cold_start"]
    command += [str(catalog), model, precision, str(side_px)]
    started_s = time.perf_counter()
    subprocess.run(command, env=environment, check=True, timeout=LIMIT_S, stdout=sys.stderr)
    return time.perf_counter() - started_s


def _start_server(
    catalog: Path, model: str, side_px: int, environment: dict[str, str], folder: Path
) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "MODEL_SERVER_HOST": "127.0.0.1",
        "MODEL_SERVER_PORT": str(port),
        "MODEL_CATALOG": str(catalog),
        "MODELS_DIR": str(catalog.parent),
        "MODEL_LOG": str(folder / "server.log"),
        "PRELOAD_MODEL": model,
    }
    body = {"prompt": "a valley", "mock_depth": True, "model": model, "response_format": "binary"}
    body |= {"width": side_px, "height": side_px, "output_format": "jpeg"}
    started_s = time.perf_counter()
    console = folder / "console.txt"
    with console.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "experimance_controlnet.model_server"],
            env=environment | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while not _answered(f"http://127.0.0.1:{port}/generate", body):
            if process.poll() is not None or time.perf_counter() - started_s > LIMIT_S:
                raise RuntimeError(f"no picture from the server: {console.read_text()[-2000:]}")
            time.sleep(POLL_S)
        seconds = time.perf_counter() - started_s
        sys.stderr.write(console.read_text())
        return seconds
    finally:
        process.terminate()
        process.wait()


def _answered(url: str, body: Mapping[str, Any]) -> bool:
    """False as long as nobody listens, or the server says that it is not ready."""
    try:
        answer = httpx.post(url, json=body, timeout=LIMIT_S)
    except httpx.ConnectError:
        return False
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return False
    answer.raise_for_status()
    return True


def make_first_picture(catalog: Path, model: str, precision: str, side_px: int) -> None:
    """Load the model and make one picture, in this process."""
    family = dataclasses.replace(FULL, side_px=side_px)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner = make_runner(FamilyFiles(family, catalog), device, precision)
    engine = Engine(runner, queue_capacity=1, max_rows=2)
    engine.start()
    [ticket] = engine.submit([standard_request(family, 0, None, model)])
    ticket.future.result()
    # like the server: nothing is torn down that the system tears down anyway
    os._exit(0)


if __name__ == "__main__":
    make_first_picture(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
