"""What the server itself costs: everything between a client and the engine, over real HTTP.

The runner only pretends (``engine/fake.py``), so no time goes into a model: what is left is
parsing, validation, the depth map, the queue, the image file and the answer. Runs anywhere.

    python -m benchmarks.http [--size 1024] [--requests 64] [--clients 1,4,16,64] [--out FILE]

Overhead of a request = its wall clock at the client - the engine's own phases (encode, denoise,
decode) as the metadata state them. The server runs in a process of its own, on 127.0.0.1. A client
is a thread with a connection of its own and the standard library's ``http.client``: a richer
library costs several milliseconds for bodies of megabytes, and those are not the server's.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from benchmarks.environment import SERVER_PACKAGES
from benchmarks.pictures import landscape
from benchmarks.record import publish, table_of
from experimance_controlnet.data_types import ImageFormat, ResponseFormat
from experimance_controlnet.server.codec import decode_depth, encode_image

FORMATS: tuple[Literal["jpeg", "png"], ...] = ("jpeg", "png")
ANSWERS: tuple[ResponseFormat, ...] = ("json", "binary")
QUALITY = 90
WARM_UPS = 3
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in milliseconds."""

    image_format: ImageFormat
    answer: ResponseFormat
    clients: int
    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    overhead_p50_ms: float
    overhead_p99_ms: float
    encode_image_ms: float
    """Median; a part of the overhead."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request."""

    wall_ms: float
    engine_ms: float
    encode_image_ms: float


def serve(size: int, announce: Connection) -> None:
    """The child process: the real server over a runner that returns one picture."""
    from experimance_controlnet.catalog.registry import load_catalog
    from experimance_controlnet.catalog.store import ModelStore
    from experimance_controlnet.engine.engine import Engine
    from experimance_controlnet.engine.fake import FakeFrame, FakeRunner
    from experimance_controlnet.engine.request import GenerationRequest, PixelImage, RequestState
    from experimance_controlnet.engine.runner import PendingFrame
    from experimance_controlnet.logs import configure_logging
    from experimance_controlnet.server.app import create_app
    from experimance_controlnet.server.listener import open_socket, url_of
    from experimance_controlnet.server.serve import Server
    from experimance_controlnet.settings import Settings

    picture = landscape(size)

    class KnownFrame(FakeFrame):
        def __init__(self, request: GenerationRequest, pixels: PixelImage) -> None:
            super().__init__(request, ready_s=0.0)
            self._pixels = pixels

        def result(self) -> tuple[PixelImage, list[str]]:
            return self._pixels, []

    class OnePicture(FakeRunner):
        def decode(self, state: RequestState) -> PendingFrame:
            return KnownFrame(state.request, picture)

    with TemporaryDirectory() as folder:
        configure_logging("error", Path(folder) / "server.log")
        settings = Settings(preload_model="lightning", model_catalog="embedded")
        engine = Engine(OnePicture(), queue_capacity=1000, max_rows=settings.max_batch_rows)
        catalog, store = load_catalog("embedded"), ModelStore(Path(folder))
        app = create_app(settings, catalog, store, engine)
        listener = open_socket("127.0.0.1", 0)
        server = Server(app, on_listening=lambda: announce.send(url_of(listener)))
        server.run(sockets=[listener])


@contextmanager
def running_server(size: int) -> Iterator[str]:
    """The address of a server that ends with the block."""
    context = multiprocessing.get_context("spawn")
    listening, announce = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(size, announce), daemon=True)
    server.start()
    announce.close()  # so that the death of the server ends the wait below
    try:
        yield listening.recv()
    finally:
        server.terminate()
        server.join()


def depth_map(size: int) -> str:
    """Base64 of a PNG; its grain makes it far harder to read than a smooth one."""
    file = io.BytesIO()
    Image.fromarray(landscape(size)[..., 0]).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


class Client:
    """One connection, which sends one body again and again."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
        self._content = json.dumps(body).encode()

    def request(self) -> Sample:
        """Send it and read the whole answer."""
        started_s = time.perf_counter()
        self._connection.request(
            "POST", "/generate", self._content, {"Content-Type": "application/json"}
        )
        answer = self._connection.getresponse()
        content = answer.read()
        wall_ms = 1000 * (time.perf_counter() - started_s)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content[:500]!r}")
        header = answer.headers["X-Generation-Metadata"]
        metadata = json.loads(content)["metadata"] if header is None else json.loads(header)
        times = metadata["times"]
        engine_s = times["encode_s"] + times["denoise_s"] + times["decode_s"]
        return Sample(wall_ms, 1000 * engine_s, 1000 * times["encode_image_s"])


def measure(
    url: str, body: dict[str, Any], image_format: ImageFormat, clients: int, requests: int
) -> Row:
    """``clients`` at a time send ``requests`` requests in all (at least one each)."""
    each = max(1, requests // clients)
    # so that the clock begins when everybody is warm
    begin = threading.Barrier(clients + 1)

    def session() -> list[Sample]:
        client = Client(url, body)
        for _ in range(WARM_UPS):
            client.request()
        begin.wait(TIMEOUT_S)
        return [client.request() for _ in range(each)]

    with ThreadPoolExecutor(clients) as pool:
        sessions = [pool.submit(session) for _ in range(clients)]
        begin.wait(TIMEOUT_S)
        started_s = time.perf_counter()
        samples = [sample for one in sessions for sample in one.result()]
        seconds = time.perf_counter() - started_s
    walls_ms = [sample.wall_ms for sample in samples]
    overheads_ms = [sample.wall_ms - sample.engine_ms for sample in samples]
    return Row(
        image_format=image_format,
        answer=body["response_format"],
        clients=clients,
        requests=len(samples),
        requests_per_s=round(len(samples) / seconds, 2),
        p50_ms=round(statistics.median(walls_ms), 1),
        p99_ms=round(float(np.percentile(walls_ms, 99)), 1),
        overhead_p50_ms=round(statistics.median(overheads_ms), 1),
        overhead_p99_ms=round(float(np.percentile(overheads_ms, 99)), 1),
        encode_image_ms=round(statistics.median(s.encode_image_ms for s in samples), 1),
    )


def parts_ms(size: int, repeats: int = 9) -> dict[str, float]:
    """What of a request's overhead is one call each, alone on this machine: medians."""
    picture, depth = landscape(size), depth_map(size)
    metadata = json.dumps({"prompt": "a valley" * 100})
    parts: dict[str, Callable[[], object]] = {
        "decode_depth": lambda: decode_depth(depth),
        "encode_jpeg": lambda: encode_image(picture, "jpeg", QUALITY, metadata),
        "encode_png": lambda: encode_image(picture, "png", QUALITY, metadata),
    }
    found: dict[str, float] = {}
    for name, work in parts.items():
        times_ms = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            work()
            times_ms.append(1000 * (time.perf_counter() - started_s))
        found[name] = round(statistics.median(times_ms), 1)
    return found


def main() -> None:
    """Start the server, measure each format in each kind of answer under each number of clients."""
    parser = argparse.ArgumentParser(description="Measure the server's own overhead over HTTP.")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side (default 1024)")
    parser.add_argument("--requests", type=int, default=64, help="a row (default 64)")
    parser.add_argument("--clients", default="1,4,16,64", help="at a time (default 1,4,16,64)")
    parser.add_argument("--out", type=Path, help="also write the JSON into this file")
    options = parser.parse_args()
    request = {
        "prompt": "a valley",
        "depth_map_b64": depth_map(options.size),
        "width": options.size,
        "height": options.size,
        "quality": QUALITY,
    }
    client_counts = [int(clients) for clients in options.clients.split(",")]
    facts = {"size_px": options.size, "parts_ms": parts_ms(options.size)}
    with running_server(options.size) as url:
        rows = []
        for clients, image_format, answer in product(client_counts, FORMATS, ANSWERS):
            body = request | {"output_format": image_format, "response_format": answer}
            rows.append(measure(url, body, image_format, clients, options.requests))
    title = f"Server overhead at {options.size}x{options.size}, runner without a model"
    publish("http", table_of(title, rows), rows, facts, SERVER_PACKAGES, options.out)


if __name__ == "__main__":
    main()
