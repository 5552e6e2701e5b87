"""The real thing as its own process: launcher, flags, signals, the embedded model."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

import experimance_controlnet
from experimance_controlnet import model_server
from tests.http.process import FOLDER, READY_S, Launch, launcher

SMALL = {"prompt": "hills", "width": 256, "height": 256, "steps": 2, "mock_depth": True}


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launcher(tmp_path) as launch:
        yield launch


def test_from_start_to_end(launch: Launch) -> None:
    server = launch()
    server.until(lambda: server.status() == "ready")
    answer = httpx.post(f"{server.url}/generate", json=SMALL | {"era": "drone"}, timeout=READY_S)
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["image_b64"])))
    assert image.size == (256, 256)
    assert re.fullmatch("[0-9a-f]{64}", answer.json()["metadata"]["model_hash"])
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    events = server.events()
    names = [event["event"] for event in events]
    # the port is open before torch and the model libraries are imported
    assert names.index("server_listening") < names.index("engine_ready")
    assert names.index("engine_ready") < names.index("model_loaded") < names.index("request_done")
    assert names.index("request_done") < names.index("server_draining")
    # and the disk is not idle meanwhile
    [ahead] = [event for event in events if event["event"] == "weights_read_ahead"]
    assert ahead["read_bytes"] > 100_000
    [listening] = [event for event in events if event["event"] == "server_listening"]
    assert (
        listening.items()
        >= {
            "url": server.url,
            "model_catalog": "embedded",
        }.items()
    )
    [ready] = [event for event in events if event["event"] == "engine_ready"]
    assert ready["device"] == "cpu" and ready["seconds"] > 0
    assert ready["precision"] == "fp32"


def test_the_server_imports_no_torch() -> None:
    """Its import takes seconds, in which nothing could answer."""
    code = (
        "import sys; from experimance_controlnet.server import app, serve; "
        "from experimance_controlnet.engine import late; "
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_garbage_is_collected_again_after_the_imports(tmp_path: Path) -> None:
    code = (
        "import gc, sys, pathlib; gc.disable(); from experimance_controlnet import model_server; "
        "catalog = model_server.load_catalog('embedded'); "
        "settings = model_server.Settings(model_device='cpu'); "
        "store = model_server.ModelStore(pathlib.Path(sys.argv[1])); "
        "model_server._make_runner(settings, catalog, store); "
        "print(gc.isenabled(), gc.get_freeze_count() > 50_000, gc.get_count()[0] < 50_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True True True\n"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"MODEL_DEVICE": "cuda"}, "MODEL_DEVICE (--model-device): there is no CUDA device here\n"),
        (
            {"MODEL_DEVICE": "auto", "PRECISION": "fp8"},
            "PRECISION (--precision): fp8 needs a CUDA device; a CPU computes in fp32, "
            "which is auto\n",
        ),
    ],
    ids=["device", "precision"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(launch: Launch, variables: dict[str, str], line: str) -> None:
    server = launch(**variables)
    assert server.ended() == 2
    assert f"model_server: {line}" in server.console.read_text()
    assert "Traceback" not in server.console.read_text()


def test_a_signal_lets_accepted_requests_finish(launch: Launch) -> None:
    server = launch()
    server.until(lambda: server.status() == "ready")
    with httpx.Client(base_url=server.url, timeout=READY_S) as idle:
        idle.get("/ping")  # keeps its connection
        asking = subprocess.Popen(
            [sys.executable, "-c", ASK, server.url, json.dumps(SMALL | {"num_images": 6})],
            stdout=subprocess.PIPE,
        )
        server.until(lambda: idle.get("/checkhealth").json()["queue_depth"] == 6)
        server.process.send_signal(signal.SIGINT)
        assert asking.communicate(timeout=READY_S)[0].strip() == b"200"
        assert server.ended() == 0


ASK = """
import json, sys, httpx
print(httpx.post(sys.argv[1] + "/generate", json=json.loads(sys.argv[2]), timeout=120).status_code)
"""


def test_a_second_signal_does_not_wait(launch: Launch) -> None:
    server = launch()
    server.until(lambda: server.status() == "ready")
    long = SMALL | {"steps": 50, "width": 1024, "height": 1024}
    with subprocess.Popen([sys.executable, "-c", ASK, server.url, json.dumps(long)]) as asking:
        health = f"{server.url}/checkhealth"
        server.until(lambda: httpx.get(health, timeout=10).json()["queue_depth"] == 1)
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: server.status() == "draining")
        second_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 128 + signal.SIGTERM
        assert time.monotonic() - second_s < 2
        asking.kill()


def test_a_signal_while_a_model_is_loading(launch: Launch) -> None:
    server = launch(PRELOAD_MODEL="lightning,hyper,base")
    server.until(lambda: server.status() != "silent")
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0


def test_a_signal_before_it_can_answer(launch: Launch) -> None:
    server = launch("--log-level", "debug")

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(server.url.rpartition(":")[2]))) == 0

    server.until(listens)
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    assert "Traceback" not in server.console.read_text()


def test_a_port_in_use(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = launch(f"--model-server-port={port}")
        assert server.ended() == 1
    assert server.console.read_text() == (
        "model_server: MODEL_SERVER_PORT (--model-server-port): "
        f"cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    )


def test_faults_are_in_the_errors_file_and_no_path_in_the_answer(
    launch: Launch, tmp_path: Path
) -> None:
    catalogue = tmp_path / "own.toml"
    catalogue.write_text(
        '[models.own]\nsource = {uri = "gone.safetensors"}\n'
        'steps = 2\ncfg = 1.0\nscheduler = "euler"\n'
    )
    server = launch("--preload-model=none", MODEL_CATALOG=str(catalogue))
    server.until(lambda: server.status() == "ready")
    answer = httpx.post(
        f"{server.url}/generate", json={"prompt": "p", "model": "own"}, timeout=READY_S
    )
    assert (answer.status_code, answer.json()["code"]) == (500, "model_file_error")
    assert "gone.safetensors does not exist" in answer.json()["detail"]
    assert str(tmp_path) not in answer.text
    lines = (tmp_path / "server.errors.log").read_text().splitlines()
    [event] = [one for one in map(json.loads, lines) if one["event"] == "problem_answered"]
    assert (event["request_id"], event["code"], event["reason"]) == (
        answer.json()["request_id"],
        answer.json()["code"],
        answer.json()["detail"],
    )


def test_the_curl_line_can_be_pasted() -> None:
    command = shlex.split(model_server.curl_line("http://127.0.0.1:5001"))
    assert command[:3] == ["curl", "-sS", "http://127.0.0.1:5001/generate"]
    assert json.loads(command[command.index("-d") + 1]) == model_server.EXAMPLE
    assert command[-2:] == ["-o", "image.png"]
    assert model_server.EXAMPLE["response_format"] == "binary"


def test_compiled_kernels_are_kept_beside_the_models(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    model_server.keep_kernels(tmp_path, environment)
    assert environment == {"TRITON_CACHE_DIR": str(tmp_path / ".cache" / "triton")}
    environment["TRITON_CACHE_DIR"] = "/operators/own"
    model_server.keep_kernels(tmp_path, environment)
    assert environment == {"TRITON_CACHE_DIR": "/operators/own"}


def test_the_console_script() -> None:
    version = subprocess.run(
        [sys.executable, "-m", "experimance_controlnet.cli", "version"],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout.strip() == experimance_controlnet.__version__
