"""What the server itself costs: everything between a client and the engine, over real HTTP.

The runner only pretends (``engine/fake.py``), so no time goes into a model: what is left is
parsing, validation, the depth map, the queue, the image file and the answer. Runs anywhere.

    python -m benchmarks.http [--size 1024] [--requests 64] [--clients 1,4,16,64]

Overhead of a request = its wall clock at the client - the engine's own phases (encode, denoise,
decode) as the metadata state them. The server runs in a process of its own, on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from experimance_controlnet import __version__

FORMATS = ("jpeg", "png")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in milliseconds."""

    image_format: str
    clients: int
    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    overhead_ms: float
    """Median."""
    encode_image_ms: float
    """Median; a part of the overhead."""


def landscape(size: int) -> NDArray[np.uint8]:
    """(size, size, 3): slopes with fine grain, about as hard to compress as a photograph."""
    y, x = np.mgrid[0:size, 0:size] / size
    slopes = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - x), np.sin(11 * x * y)], axis=-1)
    grain = np.random.default_rng(0).normal(scale=6, size=(size, size, 3))
    return np.clip(128 + 90 * slopes + grain, 0, 255).astype(np.uint8)


def serve(size: int, announce: Connection) -> None:
    """The child process: the real server over a runner that returns one picture."""
    from experimance_controlnet.catalog.registry import load_catalog
    from experimance_controlnet.catalog.store import ModelStore
    from experimance_controlnet.engine.engine import Engine
    from experimance_controlnet.engine.fake import FakeRunner
    from experimance_controlnet.engine.request import PixelImage, RequestState
    from experimance_controlnet.logs import configure_logging
    from experimance_controlnet.server.app import create_app
    from experimance_controlnet.server.listener import open_socket, url_of
    from experimance_controlnet.server.serve import Server
    from experimance_controlnet.settings import Settings

    picture = landscape(size)

    class OnePicture(FakeRunner):
        def decode(self, state: RequestState) -> PixelImage:
            return picture

    with TemporaryDirectory() as folder:
        configure_logging("error", Path(folder) / "server.log")
        settings = Settings(preload_model="lightning", model_catalog="embedded")
        engine = Engine(OnePicture(), queue_capacity=1000, max_rows=settings.max_batch_rows)
        catalog, store = load_catalog("embedded"), ModelStore(Path(folder))
        app = create_app(settings, catalog, store, engine)
        listener = open_socket("127.0.0.1", 0)
        server = Server(app, on_listening=lambda: announce.send(url_of(listener)))
        server.run(sockets=[listener])


def depth_map(size: int) -> str:
    """Base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(landscape(size)[..., 0]).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


async def measure(url: str, image_format: str, clients: int, requests: int, size: int) -> Row:
    """``requests`` requests, ``clients`` at a time."""
    body = {
        "prompt": "a valley",
        "depth_map_b64": depth_map(size),
        "width": size,
        "height": size,
        "output_format": image_format,
    }
    content = json.dumps(body).encode()
    places = asyncio.Semaphore(clients)
    walls_ms: list[float] = []
    overheads_ms: list[float] = []
    encodes_ms: list[float] = []

    async def one(client: httpx.AsyncClient) -> None:
        async with places:
            started_s = time.perf_counter()
            answer = await client.post(
                "/generate", content=content, headers={"Content-Type": "application/json"}
            )
            wall_ms = 1000 * (time.perf_counter() - started_s)
        answer.raise_for_status()
        times = answer.json()["metadata"]["times"]
        engine_ms = 1000 * (times["encode_s"] + times["denoise_s"] + times["decode_s"])
        walls_ms.append(wall_ms)
        overheads_ms.append(wall_ms - engine_ms)
        encodes_ms.append(1000 * times["encode_image_s"])

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        for _ in range(3):  # connections, threads, caches
            await one(client)
        for measured in (walls_ms, overheads_ms, encodes_ms):
            measured.clear()
        started_s = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(requests)))
        seconds = time.perf_counter() - started_s
    return Row(
        image_format=image_format,
        clients=clients,
        requests=requests,
        requests_per_s=round(requests / seconds, 2),
        p50_ms=round(statistics.median(walls_ms), 1),
        p99_ms=round(float(np.percentile(walls_ms, 99)), 1),
        overhead_ms=round(statistics.median(overheads_ms), 1),
        encode_image_ms=round(statistics.median(encodes_ms), 1),
    )


def show(rows: list[Row], size: int) -> None:
    """The table, then the JSON line."""
    table = Table(title=f"Server overhead at {size}x{size}, runner without a model")
    for name in asdict(rows[0]):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in asdict(row).values()))
    Console().print(table)
    facts = {"version": __version__, "size_px": size, "machine": platform.processor()}
    print(json.dumps({"benchmark": "http", **facts, "rows": [asdict(row) for row in rows]}))


def main() -> None:
    """Start the server, measure each format under each number of clients."""
    parser = argparse.ArgumentParser(description="Measure the server's own overhead over HTTP.")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side (default 1024)")
    parser.add_argument("--requests", type=int, default=64, help="a row (default 64)")
    parser.add_argument("--clients", default="1,4,16,64", help="at a time (default 1,4,16,64)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    listening, announce = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(options.size, announce), daemon=True)
    server.start()
    announce.close()  # so that the death of the server ends the wait below
    try:
        url = listening.recv()
        rows = [
            asyncio.run(measure(url, image_format, int(clients), options.requests, options.size))
            for image_format in FORMATS
            for clients in options.clients.split(",")
        ]
    finally:
        server.terminate()
        server.join()
    show(rows, options.size)


if __name__ == "__main__":
    main()
