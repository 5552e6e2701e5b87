"""Clients that go, servers that stop, engines that die: every request still ends once."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from experimance_controlnet.catalog.hashes import HashNotes
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import GenerationRequest, Progress
from experimance_controlnet.errors import SettingsError
from experimance_controlnet.server import bridge
from experimance_controlnet.server.app import create_app
from experimance_controlnet.server.files import ModelFiles
from experimance_controlnet.server.listener import open_socket, url_of
from experimance_controlnet.settings import Settings
from tests.http.conftest import (
    FakeStore,
    RunningServer,
    StartServer,
    make_catalog,
    source,
    wait_until,
)
from tests.http.test_errors import check_problem


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def connect_and_post(server: RunningServer, **fields: object) -> socket.socket:
    """A request whose answer nobody reads yet."""
    body = json.dumps({"prompt": "p", "width": 256, "height": 256} | fields).encode()
    head = (
        "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    address = urlsplit(server.url)
    assert address.hostname is not None
    client = socket.create_connection((address.hostname, address.port))
    client.sendall(head.encode() + body)
    return client


def outcomes(server: RunningServer) -> list[str]:
    lines = server.client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("controlnet_images_total")]


# ---- clients that go ------------------------------------------------------------------------


def test_a_client_that_goes_takes_its_images_along(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(FakeRunner(step_s=0.05))
    with connect_and_post(server, steps=50, num_images=2):
        wait_until(lambda: len(server.runner.batches) > 2)
    wait_until(lambda: server.engine.health().queue_depth == 0)
    assert len(server.runner.batches) < 40
    wait_until(
        lambda: (
            outcomes(server)
            == ['controlnet_images_total{model="lightning",outcome="cancelled"} 2.0']
        )
    )
    counted = 'controlnet_requests_total{route="/generate",status="499"} 1.0'
    assert counted in server.client.get("/metrics").text
    gc.collect()  # asyncio complains of an abandoned future when it is collected
    assert "never retrieved" not in caplog.text


def test_a_client_that_goes_while_its_request_waits(
    start_server: StartServer, pool: ThreadPoolExecutor
) -> None:
    server = start_server(FakeRunner(step_s=0.05), max_batch_rows=2)
    first = pool.submit(server.generate, steps=20)
    wait_until(lambda: len(server.runner.batches) > 0)
    with connect_and_post(server, seed=4):
        wait_until(lambda: server.engine.health().queue_depth == 2)
    wait_until(lambda: server.engine.health().queue_depth == 1)
    assert first.result().status_code == 200
    assert len(server.runner.batches) == 20


def test_a_client_that_goes_in_the_middle_of_its_body(start_server: StartServer) -> None:
    server = start_server()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port)) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"prompt'
        )
        time.sleep(0.1)
    counted = 'controlnet_requests_total{route="/generate",status="499"} 1.0'
    wait_until(lambda: counted in server.client.get("/metrics").text)


def test_an_image_that_fails_takes_its_siblings_along(start_server: StartServer) -> None:
    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "prepare" and requests[0].seed == 8:
            raise ValueError("poisoned")

    server = start_server(FakeRunner(step_s=0.05, fault=fault))
    check_problem(server.generate(seed=7, num_images=2, steps=50), 500, "generation_failed")
    wait_until(lambda: server.engine.health().queue_depth == 0)
    assert len(server.runner.batches) < 40


def test_progress_arrives_on_the_event_loop() -> None:
    engine = Engine(FakeRunner(), queue_capacity=4, max_rows=8)
    engine.start()
    seen: list[tuple[Progress, bool]] = []
    request = GenerationRequest("r", "lightning", "p", None, 64, 64, 3, 1.0, 1, "euler")

    async def never() -> None:
        await asyncio.Event().wait()

    async def make() -> None:
        loop_thread = threading.current_thread()

        def listen(progress: Progress) -> None:
            seen.append((progress, threading.current_thread() is loop_thread))

        [result] = await bridge.generate(engine, [request], never, listen)
        assert result.pixels.shape == (64, 64, 3)

    asyncio.run(make())
    engine.stop(1.0)
    assert seen == [(Progress(step, 3), True) for step in (1, 2, 3)]


# ---- servers that stop ----------------------------------------------------------------------


def test_a_server_that_stops_finishes_what_it_accepted(
    start_server: StartServer, pool: ThreadPoolExecutor
) -> None:
    server = start_server(FakeRunner(step_s=0.1), max_batch_rows=2)
    server.client.get("/ping")  # leaves an idle connection behind
    accepted = [pool.submit(server.generate, steps=5) for _ in range(6)]
    wait_until(lambda: server.engine.health().queue_depth == 6)
    server.server.should_exit = True
    wait_until(lambda: server.engine.health().draining)
    refused = server.generate()
    check_problem(refused, 503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    check_problem(server.client.post("/preload", params={"model_name": "base"}), 503, "draining")
    assert server.client.get("/ping").status_code == 200
    health = server.client.get("/checkhealth")
    assert (health.status_code, health.json()["status"]) == (200, "draining")
    assert health.json()["ready_for_inference"] is False
    assert [one.result().status_code for one in accepted] == [200] * 6
    assert server.ended() == 0


def test_a_server_that_stops_keeps_to_its_grace(
    start_server: StartServer, pool: ThreadPoolExecutor
) -> None:
    server = start_server(FakeRunner(step_s=0.1), shutdown_grace_s=0.5)
    too_long = pool.submit(server.generate, steps=50)
    wait_until(lambda: len(server.runner.batches) > 0)
    started_s = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started_s < 4
    check_problem(too_long.result(), 503, "draining")


def test_a_server_that_stops_does_not_wait_for_a_transfer(
    start_server: StartServer, pool: ThreadPoolExecutor
) -> None:
    store = FakeStore(fetch_s=3.0)
    store.lacks("lightning")
    server = start_server(store=store, preload_model="lightning")
    waiting = [
        pool.submit(server.generate),
        pool.submit(server.client.post, "/preload", params={"model_name": "lightning"}),
    ]
    wait_until(lambda: len(store.fetched) == 1)
    time.sleep(0.2)
    started_s = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started_s < 2
    for one in waiting:
        check_problem(one.result(), 503, "draining")


def test_a_server_that_stops_does_not_wait_for_a_model_nobody_asked_for(
    start_server: StartServer,
) -> None:
    server = start_server(FakeRunner(load_s=3.0), preload_model="lightning")
    wait_until(lambda: server.engine.health().models_loading == ("lightning",))
    started_s = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started_s < 2


def test_the_lifespan_alone_starts_and_drains_too() -> None:
    """For whoever runs the application in another server."""
    engine = Engine(FakeRunner(step_s=0.05), queue_capacity=4, max_rows=8)
    settings = Settings(preload_model="none", shutdown_grace_s=5)
    app = create_app(settings, make_catalog(), FakeStore(), engine)

    async def use() -> httpx.Response:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                body = {"prompt": "p", "width": 256, "height": 256}
                request = asyncio.ensure_future(client.post("/generate", json=body))
                await asyncio.to_thread(wait_until, lambda: engine.health().queue_depth > 0)
                await app.state.services.stop_engine()
                return await request

    assert asyncio.run(use()).status_code == 200
    assert engine.health().draining


def test_an_engine_that_dies_while_the_server_stops(
    start_server: StartServer, pool: ThreadPoolExecutor
) -> None:
    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "decode":
            raise RuntimeError("CUDA error: device-side assert triggered")

    server = start_server(FakeRunner(step_s=0.1, fault=fault))
    image = pool.submit(server.generate, steps=10)
    wait_until(lambda: len(server.runner.batches) > 0)
    assert server.stop() == 1
    check_problem(image.result(), 503, "engine_dead")


# ---- engines that die -----------------------------------------------------------------------


def check_dead(server: RunningServer, pending: list[Future[httpx.Response]]) -> None:
    """Everybody is told, health says so, and the process ends with 1, soon."""
    wait_until(lambda: not server.engine.health().alive)
    died_s = time.monotonic()
    assert server.client.get("/ping").status_code == 200
    health = server.client.get("/checkhealth")
    assert time.monotonic() - died_s < 2
    assert (health.status_code, health.json()["status"]) == (503, "error")
    assert health.json()["model_server_healthy"] is False
    assert health.json()["ready_for_inference"] is False
    assert health.json()["last_error"]
    check_problem(server.generate(), 503, "engine_dead")
    for answer in pending:
        check_problem(answer.result(), 503, "engine_dead")
        assert int(answer.result().headers["retry-after"]) >= 1
    assert server.ended() == 1
    assert time.monotonic() - died_s < 10


def test_an_engine_that_dies(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    everybody_waits = threading.Event()

    def die(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "predict":
            everybody_waits.wait(20)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    server = start_server(FakeRunner(fault=die))
    pending = [pool.submit(server.generate, num_images=2)]
    pending += [pool.submit(server.generate) for _ in range(3)]
    wait_until(lambda: server.engine.health().queue_depth == 5)
    everybody_waits.set()
    check_dead(server, pending)


def test_an_engine_that_hangs(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    release = threading.Event()

    def hang(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "predict":
            release.wait(20)

    server = start_server(FakeRunner(fault=hang), watchdog_s=0.5)
    try:
        check_dead(server, [pool.submit(server.generate) for _ in range(2)])
    finally:
        release.set()


# ---- files ----------------------------------------------------------------------------------


def test_one_transfer_for_everybody(start_server: StartServer, pool: ThreadPoolExecutor) -> None:
    store = FakeStore(fetch_s=0.5)
    store.lacks("hyper")
    server = start_server(store=store)
    answers = [pool.submit(server.generate, model="hyper") for _ in range(10)]
    assert [one.result().status_code for one in answers] == [200] * 10
    assert store.fetched == [source("hyper")]


def test_an_absence_is_believed_for_some_minutes_only(tmp_path: Path) -> None:
    store, now = FakeStore(), [0.0]
    files = ModelFiles(store, HashNotes(tmp_path), clock=lambda: now[0])
    files._absent_until_s[source("drone")] = 600.0
    assert source("drone") in files.absent
    now[0] = 601.0
    assert source("drone") not in files.absent


# ---- the socket -----------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_line() -> None:
    with open_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            SettingsError,
            match=rf"^MODEL_SERVER_PORT \(--model-server-port\): .+ 127.0.0.1 port {port}: .+$",
        ):
            open_socket("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "::zz", "198.51.100.7"])
def test_a_host_that_is_not_this_machine(host: str) -> None:
    with pytest.raises(SettingsError, match=r"^MODEL_SERVER_HOST \(--model-server-host\): .+$"):
        open_socket(host, 0)


@pytest.mark.parametrize(
    ("host", "reachable"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")]
)
def test_the_url_of_a_socket_can_be_reached(host: str, reachable: str) -> None:
    with open_socket(host, 0) as listener:
        assert url_of(listener) == f"http://{reachable}:{listener.getsockname()[1]}"
