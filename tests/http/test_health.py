"""What the server says about itself, and models on demand."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from experimance_controlnet import __version__
from experimance_controlnet.catalog.progress import TransferStatus
from experimance_controlnet.data_types import HealthResponse
from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import GenerationRequest
from experimance_controlnet.errors import DownloadError, NotFoundUpstreamError
from tests.http.conftest import FakeStore, RunningServer, StartServer, source, wait_until
from tests.http.test_errors import check_problem


def status_of(server: RunningServer) -> str:
    return str(server.client.get("/checkhealth").json()["status"])


@pytest.mark.parametrize("path", ["/checkhealth", "/healthcheck"])
def test_health_when_all_is_well(server: RunningServer, path: str) -> None:
    answer = server.client.get(path)
    assert answer.status_code == 200
    health = HealthResponse.model_validate_json(answer.content)
    assert (health.status, health.model_server_healthy) == ("ready", True)
    assert health.ready_for_inference
    assert (health.queue_depth, health.queue_workload) == (0, 0)
    assert health.last_error is None
    assert health.uptime > 0
    assert (health.device, health.version) == ("fake", __version__)
    assert health.precision == "fp32"
    assert health.memory_usage.ram_mb > 10


def test_health_names_the_transfers_that_run(start_server: StartServer) -> None:
    store = FakeStore()
    server = start_server(store=store)
    assert server.client.get("/checkhealth").json()["downloads"] == []
    store.running.append(TransferStatus("host/a.safetensors", 10, None, 2.04))
    assert server.client.get("/checkhealth").json()["downloads"] == [
        {"name": "host/a.safetensors", "done_bytes": 10, "total_bytes": None, "bytes_per_s": 2.0}
    ]


def test_health_and_ping_do_not_wait_for_the_device(start_server: StartServer) -> None:
    server = start_server(FakeRunner(step_s=1.0))
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.generate, steps=2)
        wait_until(lambda: len(server.runner.batches) == 1)
        started_s = time.monotonic()
        assert server.client.get("/ping").json() == {"status": "ok"}
        health = server.client.get("/checkhealth").json()
        assert time.monotonic() - started_s < 0.5
        assert health["queue_depth"] == 1
        assert health["queue_workload"] > 0
        assert image.result().status_code == 200


def test_preload_happens_behind_the_ping(start_server: StartServer) -> None:
    store = FakeStore(fetch_s=0.5)
    store.lacks("lightning")
    server = start_server(FakeRunner(load_s=0.5), store, preload_model="lightning, hyper")
    assert server.client.get("/ping").status_code == 200
    seen = [server.client.get("/checkhealth").json()]
    while seen[-1]["status"] != "ready":
        assert seen[-1]["ready_for_inference"] is False
        time.sleep(0.05)
        seen.append(server.client.get("/checkhealth").json())
    statuses = list(dict.fromkeys(one["status"] for one in seen))
    assert statuses[:2] == ["starting", "loading_models"]
    assert seen[-1]["models_loaded"] == ["lightning", "hyper"]
    assert seen[-1]["ready_for_inference"] is True


def test_health_says_what_is_on_its_way(start_server: StartServer) -> None:
    server = start_server(FakeRunner(load_s=1.0, parked=["base"]))
    wait_until(lambda: status_of(server) == "ready")
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.generate, model="base")
        wait_until(lambda: status_of(server) == "loading_models")
        health = server.client.get("/checkhealth").json()
        assert health["models_parked"] == ["base"]
        [load] = health["loading"]
        assert 0 <= load.pop("seconds") <= 1.5
        assert load == {"kind": "model", "name": "base", "source": "host", "share": 0.5}
        assert 'controlnet_model_parked{model="base"} 1.0' in server.client.get("/metrics").text
        assert image.result().status_code == 200
    health = server.client.get("/checkhealth").json()
    assert health["models_parked"] == health["loading"] == []
    count = 'controlnet_model_loads_total{model="base",source="host"} 1.0'
    assert count in server.client.get("/metrics").text


def test_a_picture_waits_for_the_hash_and_readiness_does_not(start_server: StartServer) -> None:
    store = FakeStore()
    store.may_hash.clear()
    server = start_server(store=store, preload_model="lightning")
    wait_until(lambda: status_of(server) == "ready")
    assert server.client.get("/checkhealth").json()["ready_for_inference"] is True
    assert server.client.post("/preload", params={"model_name": "lightning"}).status_code == 200
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.generate)
        wait_until(lambda: len(server.runner.batches) == 6)
        time.sleep(0.2)
        assert not image.done()
        store.may_hash.set()
        assert (
            image.result().json()["metadata"]["model_hash"] == f"hash of {source('lightning').uri}"
        )
    assert store.hashed == [source("lightning")]


def test_the_hash_is_computed_beside_the_load(start_server: StartServer) -> None:
    server = start_server(FakeRunner(load_s=1.0))
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.generate, model="hyper")
        wait_until(lambda: server.store.hashed == [source("hyper")])
        assert server.runner.loaded_models == ()
        assert image.result().status_code == 200


def test_a_preload_that_fails_is_told_and_can_be_repeated(start_server: StartServer) -> None:
    store = FakeStore()
    store.lacks("lightning", DownloadError("The origin does not answer."))
    server = start_server(store=store, preload_model="lightning,hyper")
    wait_until(lambda: status_of(server) == "error")
    health = server.client.get("/checkhealth")
    assert health.status_code == 200  # the server itself is well
    assert health.json()["ready_for_inference"] is False
    assert health.json()["last_error"] == "The origin does not answer."
    assert health.json()["models_loaded"] == ["hyper"]
    store.faults.clear()
    assert server.client.post("/preload", params={"model_name": "lightning"}).status_code == 200
    assert status_of(server) == "ready"
    assert server.client.get("/checkhealth").json()["last_error"] is None


def test_a_second_model_does_not_make_the_server_unready(start_server: StartServer) -> None:
    server = start_server(FakeRunner(load_s=0.5), preload_model="lightning")
    wait_until(lambda: status_of(server) == "ready")
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.generate, model="hyper")
        wait_until(lambda: status_of(server) == "loading_models")
        assert server.client.get("/checkhealth").json()["ready_for_inference"] is True
        assert image.result().status_code == 200


def test_models_lists_every_name(start_server: StartServer) -> None:
    server = start_server()
    models = server.client.get("/models").json()
    names = {key: value for key, value in models.items() if key.startswith("available_")}
    assert names == {
        "available_models": ["lightning", "hyper", "base"],
        "available_eras": [
            *("wilderness", "modern", "drone", "experimance", "experimance_wilderness")
        ],
        "available_schedulers": [
            *("auto", "euler", "euler_a", "dpm_sde"),
            *("dpm_multi", "dpm_single", "ddim", "lcm"),
        ],
        "available_loras": ["drone", "experimance", "experimance_wilderness"],
        "available_controlnets": ["sdxl_small"],
    }
    for kind in ("models", "controlnets", "loras"):
        assert list(models[kind]) == models[f"available_{kind}"]
    assert list(models["eras"]) == ["wilderness", "modern"]


def test_models_says_where_everything_is(start_server: StartServer) -> None:
    store = FakeStore()
    store.lacks("base")
    store.lacks("experimance")
    store.hashes[source("lightning")] = "ab" * 32
    server = start_server(store=store)
    server.client.post("/preload", params={"model_name": "hyper"})
    models = server.client.get("/models").json()
    hyper_hash = f"hash of {source('hyper').uri}"
    keys = ("steps", "cfg", "scheduler", "on_disk", "in_memory", "sha256")
    assert {name: tuple(info[key] for key in keys) for name, info in models["models"].items()} == {
        "lightning": (6, 2.0, "euler", False, False, "ab" * 32),  # its base is not there
        "hyper": (8, 6.0, "euler", True, True, hyper_hash),  # computed when it was loaded
        "base": (20, 7.5, "dpm_sde", False, False, None),
    }
    assert models["models"]["base"]["size_bytes"] is None
    assert models["models"]["hyper"] == {
        "steps": 8,
        "cfg": 6.0,
        "scheduler": "euler",
        "scheduler_config": {},
        "on_disk": True,
        "in_memory": True,
        "size_bytes": len(source("hyper").uri),
        "sha256": hyper_hash,
        "unavailable": None,
    }
    assert models["loras"]["drone"] == {
        "weight": 0.8,
        "on_disk": True,
        "in_memory": False,
        "size_bytes": len(source("drone").uri),
        "sha256": None,
        "unavailable": None,
    }
    assert models["controlnets"]["sdxl_small"]["on_disk"] is True
    assert models["eras"]["modern"] == {
        "adapters": {"drone": 0.3, "experimance": 0.6},
        "alternative": None,
        "uses_alternative": False,
        "on_disk": False,
        "in_memory": False,
        "size_bytes": None,
        "unavailable": None,
    }


def test_models_says_why_something_cannot_be_had(start_server: StartServer) -> None:
    store = FakeStore()
    store.lacks("experimance_wilderness", NotFoundUpstreamError("It answers 404."))
    store.lacks("base", DownloadError("The network is down."))
    server = start_server(store=store)
    assert server.generate(era="wilderness", model="hyper").status_code == 200
    assert server.generate(model="base").status_code == 502

    def unavailable(kind: str, name: str) -> str | None:
        reason: str | None = server.client.get("/models").json()[kind][name]["unavailable"]
        return reason

    assert unavailable("loras", "experimance_wilderness") == "It answers 404."
    assert unavailable("models", "base") == "The network is down."
    assert unavailable("models", "lightning") == "The network is down.", "of its base_source"
    assert unavailable("models", "hyper") is None
    era = server.client.get("/models").json()["eras"]["wilderness"]
    assert (era["uses_alternative"], era["on_disk"], era["unavailable"]) == (True, True, None)
    del store.faults[source("base")]
    assert server.generate(model="base").status_code == 200
    assert unavailable("models", "base") is None


def test_models_does_not_wait_for_a_transfer(start_server: StartServer) -> None:
    store = FakeStore(fetch_s=0.3)
    store.lacks("base")
    server = start_server(store=store)
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.generate, model="base")
        wait_until(lambda: bool(store.fetched))
        assert server.client.get("/models").json()["models"]["base"]["on_disk"] is False
        assert image.result().status_code == 200
    assert server.client.get("/models").json()["models"]["base"]["on_disk"] is True


def test_preload_and_unload(start_server: StartServer) -> None:
    server = start_server()
    loaded = server.client.post("/preload", params={"model_name": "hyper"})
    assert loaded.json() == {
        "status": "success",
        "message": "The model hyper is in memory.",
        "loaded_models": ["hyper"],
    }
    for _ in range(2):  # the second finds nothing to free, which is what was asked for
        freed = server.client.post("/unload", params={"model_key": "hyper"})
        assert freed.json() == {
            "status": "success",
            "message": "The model hyper is not in memory.",
            "loaded_models": [],
        }


def test_a_model_in_use_is_not_unloaded(start_server: StartServer) -> None:
    server = start_server(FakeRunner(step_s=0.2))
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.generate)
        wait_until(lambda: len(server.runner.batches) > 0)
        answer = server.client.post("/unload", params={"model_key": "lightning"})
        check_problem(answer, 503, "model_busy")
        assert int(answer.headers["retry-after"]) >= 1
        assert image.result().status_code == 200


@pytest.mark.parametrize(("path", "field"), [("/preload", "model_name"), ("/unload", "model_key")])
def test_models_that_do_not_exist(server: RunningServer, path: str, field: str) -> None:
    answer = server.client.post(path, params={field: "turbo"})
    problem = check_problem(answer, 422, "unknown_name")
    assert problem["errors"][0]["field"] == field
    check_problem(server.client.post(path), 422, "invalid_request")
    check_problem(server.client.post(path, params={field: "x" * 65}), 422, "invalid_request")


def test_a_preload_that_fails_on_demand(start_server: StartServer) -> None:
    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == "load":
            raise DownloadError("The file is gone.")

    server = start_server(FakeRunner(fault=fault))
    answer = server.client.post("/preload", params={"model_name": "base"})
    check_problem(answer, 502, "download_failed")
