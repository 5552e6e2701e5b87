"""An empty disk: the first requests bring the model files, from origins on the loopback."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

import experimance_controlnet
from experimance_controlnet.catalog.hashes import hash_file
from tests.disk import fill, small_disk
from tests.http.process import READY_S, launcher
from tests.hub import serve_folder
from tests.origin import Origin, Reply

EMBEDDED = Path(experimance_controlnet.__file__).parent / "catalog" / "embedded"
LORA = EMBEDDED / "loras" / "experimance.safetensors"
REQUESTS = 20

CATALOG = """
[models.lightning]
steps = 1
cfg = 1.0
scheduler = "euler"
source = { uri = "hf://acme/lightning" }
base_source = { uri = "hf://acme/base" }
[models.lightning.scheduler_config]
beta_schedule = "scaled_linear"
beta_start = 0.00085
beta_end = 0.012

[controlnets.sdxl_small]
source = { uri = "hf://acme/controlnet" }

[loras.experimance]
source = { uri = "URL/experimance.safetensors" }
"""


def test_twenty_first_requests_share_the_transfers(tmp_path: Path) -> None:
    origin = Origin()
    for name in ("lightning", "base", "controlnet"):
        serve_folder(origin, f"acme/{name}", EMBEDDED / name)
    lora = Reply(body=LORA.read_bytes(), etag='"1"', drip_s=0.05)
    origin.serve("/experimance.safetensors", lora)
    catalog = tmp_path / "acme.toml"
    catalog.write_text(CATALOG.replace("URL", origin.url))
    variables = {
        "MODEL_CATALOG": str(catalog),
        "PRELOAD_MODEL": "none",
        "HF_ENDPOINT": origin.url,
        "REQUEST_TIMEOUT_S": str(READY_S),
    }
    with launcher(tmp_path) as launch:
        server = launch(**variables)
        server.until(lambda: server.status() != "silent")
        empty = httpx.get(f"{server.url}/models", timeout=READY_S).json()  # while it starts
        for info in (empty["models"]["lightning"], empty["loras"]["experimance"]):
            assert (info["on_disk"], info["in_memory"], info["sha256"]) == (False, False, None)

        def ask(seed: int) -> int:
            body = {"prompt": "hills", "era": "experimance", "mock_depth": True, "seed": seed}
            body |= {"width": 256, "height": 256}
            return httpx.post(f"{server.url}/generate", json=body, timeout=READY_S).status_code

        with ThreadPoolExecutor(REQUESTS) as pool:
            statuses = list(pool.map(ask, range(REQUESTS)))
        assert statuses == [200] * REQUESTS, server.console.read_text()
        events = server.events()
        known = httpx.get(f"{server.url}/models", timeout=READY_S).json()
    origin.close()
    started = [event["uri"] for event in events if event["event"] == "download_started"]
    assert sorted(started) == [
        "hf://acme/base",
        "hf://acme/controlnet",
        "hf://acme/lightning",
        f"{origin.url}/experimance.safetensors",
    ]
    bodies = {path: replies[0].body for path, replies in origin.replies.items()}
    asked = set(origin.requests) & set(bodies)  # the Hub's library asks for more, and gets a 404
    assert len(asked) > 10
    assert origin.sent_bytes == sum(len(bodies[path]) for path in asked), "each byte once"
    models = tmp_path / "models"
    assert [path for path in models.rglob("*") if "partial" in path.name] == []
    place = models / f"127.0.0.1_{origin.port}" / "experimance.safetensors"
    assert place.read_bytes() == LORA.read_bytes()
    assert json.dumps(events).count("download_failed") == 0
    for kind, name in (
        ("models", "lightning"),
        ("controlnets", "sdxl_small"),
        ("loras", "experimance"),
    ):
        info = known[kind][name]
        assert (info["on_disk"], info["in_memory"], info["unavailable"]) == (True, True, None)
        assert re.fullmatch("[0-9a-f]{64}", info["sha256"]), "known from the transfer"
    lora = known["loras"]["experimance"]
    assert lora["size_bytes"] == len(LORA.read_bytes())
    assert lora["sha256"] == hash_file(LORA)


def test_a_full_disk_refuses_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    origin = Origin()
    origin.serve("/moss.safetensors", Reply(body=LORA.read_bytes(), etag='"1"'))
    catalog = tmp_path / "moss.toml"
    catalog.write_text(
        f'extends = "embedded"\n[loras.moss]\nsource = "{origin.url}/moss.safetensors"\n'
    )
    with small_disk(tmp_path / "disk") as disk, launcher(tmp_path) as launch:
        models = disk / "models"
        server = launch(MODEL_CATALOG=str(catalog), MODELS_DIR=str(models))
        server.until(lambda: server.status() == "ready")

        def ask(**changes: object) -> httpx.Response:
            body = {"prompt": "hills", "mock_depth": True, "width": 256, "height": 256} | changes
            return httpx.post(f"{server.url}/generate", json=body, timeout=READY_S)

        with_moss = {"loras": [{"name": "moss", "strength": 0.5}]}
        fill(disk / "filler")
        refused = ask(**with_moss)
        assert (refused.status_code, refused.json()["code"]) == (507, "disk_full")
        assert ask().status_code == 200
        assert [path for path in models.rglob("*") if "moss" in path.name] == []
        (disk / "filler").unlink()
        assert ask(**with_moss).status_code == 200
        assert len([path for path in models.rglob("*") if path.name == "moss.safetensors"]) == 1
        server.process.terminate()  # whose files would keep the disk busy
        assert server.ended() == 0
    origin.close()
