"""A real server on a free port, in a thread, over a runner that only pretends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from experimance_controlnet.catalog.inventory import Found
from experimance_controlnet.catalog.progress import TransferStatus
from experimance_controlnet.catalog.specs import (
    AdapterUse,
    Catalog,
    ControlNetSpec,
    EraSpec,
    LoraSpec,
    ModelSpec,
    Source,
)
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.server.app import create_app
from experimance_controlnet.server.listener import open_socket, url_of
from experimance_controlnet.server.serve import Server
from experimance_controlnet.server.services import Services
from experimance_controlnet.settings import Settings

WAIT_S = 20.0


def source(name: str) -> Source:
    return Source(f"https://origin.test/{name}.safetensors")


def make_catalog() -> Catalog:
    """Names and figures of the installation's catalogue; nothing behind them."""
    models = [
        ModelSpec("lightning", source("lightning"), 6, 2.0, "euler", {}, source("base")),
        ModelSpec("hyper", source("hyper"), 8, 6.0, "euler", {}),
        ModelSpec("base", source("base"), 20, 7.5, "dpm_sde", {}),
    ]
    loras = [
        LoraSpec("drone", source("drone"), 0.8),
        LoraSpec("experimance", source("experimance")),
        LoraSpec("experimance_wilderness", source("experimance_wilderness")),
    ]
    eras = [
        EraSpec(
            "wilderness",
            (AdapterUse("experimance_wilderness", 1.0),),
            (AdapterUse("drone", 0.8), AdapterUse("experimance", 0.4)),
        ),
        EraSpec("modern", (AdapterUse("drone", 0.3), AdapterUse("experimance", 0.6))),
    ]
    return Catalog(
        name="fake",
        models={model.name: model for model in models},
        controlnets={"sdxl_small": ControlNetSpec("sdxl_small", source("sdxl_small"))},
        loras={lora.name: lora for lora in loras},
        eras={era.name: era for era in eras},
    )


@dataclass
class FakeStore:
    """The interface of ModelStore over a set of names. Everything is there, unless it is not."""

    missing: set[Source] = field(default_factory=set)
    faults: dict[Source, Exception] = field(default_factory=dict)
    hashes: dict[Source, str] = field(default_factory=dict)
    """Those that are known without reading."""
    fetch_s: float = 0.0
    fetched: list[Source] = field(default_factory=list)
    hashed: list[Source] = field(default_factory=list)
    may_hash: threading.Event = field(default_factory=threading.Event)
    """Hashing ends when it is set, as it is at first."""
    running: list[TransferStatus] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_hash.set()

    def is_remote(self, source: Source) -> bool:
        return True

    def path(self, source: Source) -> Path | None:
        return None if source in self.missing else Path("/nothing/is/here")

    def glance(self, source: Source) -> Found | None:
        if self.path(source) is None:
            return None
        return Found(Path(source.uri), len(source.uri), self.hashes.get(source))

    def fetch(self, source: Source) -> str:
        self.fetched.append(source)
        time.sleep(self.fetch_s)
        if source in self.faults:
            raise self.faults[source]
        self.missing.discard(source)
        return source.uri

    def content_hash(self, source: Source) -> str | None:
        self.hashed.append(source)
        assert self.may_hash.wait(WAIT_S)
        return f"hash of {source.uri}"

    def downloads(self) -> list[TransferStatus]:
        return list(self.running)

    def lacks(self, name: str, error: Exception | None = None) -> None:
        """That file has to be fetched, which fails where an error is given."""
        self.missing.add(source(name))
        if error is not None:
            self.faults[source(name)] = error


@dataclass
class RunningServer:
    url: str
    client: httpx.Client
    server: Server
    thread: threading.Thread
    engine: Engine
    runner: FakeRunner
    store: FakeStore

    @property
    def services(self) -> Services:
        services: Services = self.server.config.app.state.services  # type: ignore[union-attr]
        return services

    def generate(self, **fields: Any) -> httpx.Response:
        """``POST /generate`` of a small image; a field given as None is sent as null."""
        body = {"prompt": "hills", "width": 256, "height": 256} | fields
        return self.client.post("/generate", json=body)

    def stop(self) -> int:
        """As a signal would; returns the exit status."""
        self.server.should_exit = True
        return self.ended()

    def ended(self) -> int:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.server.exit_status


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def start_server() -> Iterator[StartServer]:
    """``start_server(runner, store, **settings)``; stopped at the end of the module's tests."""
    running: list[RunningServer] = []

    def start(
        runner: FakeRunner | None = None, store: FakeStore | None = None, **settings: Any
    ) -> RunningServer:
        runner, store = runner or FakeRunner(), store or FakeStore()
        defaults: dict[str, Any] = {"preload_model": "none", "shutdown_grace_s": 5.0}
        chosen = Settings(**(defaults | settings))
        engine = Engine(
            runner,
            queue_capacity=chosen.queue_capacity,
            max_rows=chosen.max_batch_rows,
            watchdog_s=chosen.watchdog_s,
        )
        listening = threading.Event()
        server = Server(create_app(chosen, make_catalog(), store, engine), listening.set)
        listener = open_socket("127.0.0.1", 0)
        url = url_of(listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert listening.wait(WAIT_S)
        client = httpx.Client(base_url=url, timeout=WAIT_S)
        running.append(RunningServer(url, client, server, thread, engine, runner, store))
        return running[-1]

    yield start
    for one in running:
        one.client.close()
        one.server.should_exit = True
    for one in running:
        one.ended()


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> RunningServer:
    """One for all tests of a module that leave nothing behind."""
    return start_server()


def wait_until(condition: Callable[[], bool]) -> None:
    """Until it holds; fails after a while."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
