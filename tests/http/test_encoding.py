"""Image files are made beside the engine, never in its way."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import GenerationRequest
from experimance_controlnet.server.codec import CODEC_THREADS
from tests.http.conftest import WAIT_S, StartServer, wait_until

REQUESTS = 5


def test_the_engine_goes_on_while_no_image_can_be_encoded(start_server: StartServer) -> None:
    decoded: list[int] = []

    def note(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "decode":
            decoded.extend(request.seed for request in requests)

    server = start_server(FakeRunner(fault=note))
    occupied, release = threading.Semaphore(0), threading.Event()

    def occupy() -> None:
        occupied.release()
        release.wait(WAIT_S)

    with ThreadPoolExecutor(CODEC_THREADS + REQUESTS) as pool:
        try:
            for _ in range(CODEC_THREADS):
                pool.submit(lambda: asyncio.run(server.services.codec.run(occupy)))
            for _ in range(CODEC_THREADS):
                assert occupied.acquire(timeout=WAIT_S)
            answers = [pool.submit(server.generate, seed=seed) for seed in range(REQUESTS)]
            wait_until(lambda: len(decoded) == REQUESTS)
            wait_until(lambda: server.engine.health().queue_depth == 0)
            assert not any(answer.done() for answer in answers)
        finally:
            release.set()
        assert [answer.result().status_code for answer in answers] == [200] * REQUESTS
    assert sorted(decoded) == list(range(REQUESTS))
