"""What a bad request gets: the right status and one body, whatever it is that is wrong."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx
import pytest
import structlog
from PIL import Image

from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import GenerationRequest
from experimance_controlnet.errors import (
    BadAdapterError,
    BadWeightsError,
    DeviceMemoryError,
    DiskFullError,
    DownloadError,
    NanOutputError,
)
from tests.http.conftest import FakeStore, RunningServer, StartServer, wait_until

CANARY = "canary-5d1f"
JSON = {"Content-Type": "application/json"}


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The one body of every error, and nothing in it that should not be."""
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body.keys() == {
        *("type", "title", "status", "detail", "code", "request_id"),
        *("success", "error_message", "errors"),
    }
    assert body["status"] == status
    assert body["success"] is False
    assert body["title"]
    assert body["error_message"] == body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert CANARY not in answer.text
    return body


def fields_of(problem: dict[str, Any]) -> list[str]:
    return [fault["field"] for fault in problem["errors"]]


# ---- fields ---------------------------------------------------------------------------------

JUST_OUTSIDE: dict[str, list[Any]] = {
    "prompt": ["", "x" * 2001, "a\0b", 7, None],
    "negative_prompt": ["x" * 2001, "a\0b", 7],
    "depth_map_b64": [7, ["x"]],
    "mock_depth": ["perhaps", 2],
    "model": ["", "x" * 65, 7],
    "era": ["", "x" * 65, 7],
    "loras": [7, "drone", {"name": "drone"}, [{"name": f"l{i}"} for i in range(9)]],
    "steps": [0, 51, -1, 2.5, "many", 10**400],
    "cfg": [0, 0.09, 20.1, "much"],
    "seed": [-1, 2**32, 0.5],
    "lora_strength": [-0.1, 2.1],
    "controlnet_strength": [-0.1, 2.1],
    "control_guidance_start": [-0.1, 1.1],
    "control_guidance_end": [-0.1, 1.1],
    "scheduler": ["", "plms", 7],
    "use_karras_sigmas": ["perhaps"],
    "width": [0, 192, 255, 257, 1000, 2112, 2**70],
    "height": [0, 192, 255, 257, 1000, 2112],
    "num_images": [0, 9],
    "output_format": ["gif", "PNG"],
    "quality": [0, 101],
    "response_format": ["xml"],
    "controlnet": ["", "x" * 65],
    "use_jpeg": ["perhaps"],
    "enable_deepcache": ["perhaps"],
}
JUST_INSIDE: dict[str, list[Any]] = {
    "prompt": ["x", "x" * 2000],
    "negative_prompt": ["", "x" * 2000],
    "loras": [
        [],
        [{"name": "drone"}],
        [{"name": "drone", "strength": 2}],
        [{"name": "drone", "strength": None}],
    ],
    "steps": [1, 50],
    "cfg": [0.1, 20],
    "seed": [0, 2**32 - 1],
    "lora_strength": [0, 2],
    "controlnet_strength": [0, 2],
    "control_guidance_start": [0, 1],
    "control_guidance_end": [0, 1],
    "scheduler": ["auto", "euler", "dpm_sde", "euler_a", "dpm_multi", "dpm_single", "ddim", "lcm"],
    "use_karras_sigmas": [True, False],
    "width": [256, 320, 2048],
    "height": [256, 320, 2048],
    "num_images": [1, 8],
    "quality": [1, 100],
    "enable_deepcache": [True, False],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in JUST_OUTSIDE.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_a_value_out_of_bounds(server: RunningServer, field: str, value: Any) -> None:
    batches = len(server.runner.batches)
    body = {"prompt": "p", "width": 256, "height": 256} | {field: value}
    started_s = time.monotonic()
    answer = server.client.post("/generate", content=json.dumps(body), headers=JSON)
    assert time.monotonic() - started_s < 1  # nothing was begun; the machine may be busy
    problem = check_problem(answer, 422, "invalid_request")
    assert {name.split(".")[0] for name in fields_of(problem)} == {field}
    assert field in problem["detail"]
    assert len(server.runner.batches) == batches


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in JUST_INSIDE.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_a_value_within_bounds(server: RunningServer, field: str, value: Any) -> None:
    assert server.generate(**{field: value}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "field", "code"),
    [
        ({"model": CANARY}, "model", "unknown_name"),
        ({"era": CANARY}, "era", "unknown_name"),
        ({"controlnet": CANARY}, "controlnet", "unknown_name"),
        ({"loras": [{"name": "drone"}, {"name": CANARY}]}, "loras.1.name", "unknown_name"),
        ({"model": "../../etc/passwd"}, "model", "unknown_name"),
        ({"era": "%2e%2e/x"}, "era", "unknown_name"),
        ({"upscale": CANARY}, "upscale", "invalid_request"),
        ({"loras": [{"name": "drone", "weight": 1}]}, "loras.0.weight", "invalid_request"),
        ({"loras": [{"name": "drone"}, {"name": "drone"}]}, "loras", "invalid_request"),
        ({"loras": [{"name": "drone", "strength": 2.1}]}, "loras.0.strength", "invalid_request"),
        ({"scheduler": "ddim", "use_karras_sigmas": True}, "use_karras_sigmas", "invalid_request"),
        ({"depth_map_b64": "\udfff"}, "depth_map_b64", "bad_depth_map"),
        ({"depth_map_b64": f"{CANARY}!"}, "depth_map_b64", "bad_depth_map"),
        ({"control_guidance_start": 0.6, "control_guidance_end": 0.5}, "body", "invalid_request"),
        ({"use_jpeg": True, "output_format": "png"}, "body", "invalid_request"),
        ({"num_images": 2, "response_format": "binary"}, "body", "invalid_request"),
    ],
)
def test_what_is_not_there_or_does_not_fit(
    server: RunningServer, fields: dict[str, Any], field: str, code: str
) -> None:
    body = {"prompt": "p", "width": 256, "height": 256} | fields
    answer = server.client.post("/generate", content=json.dumps(body), headers=JSON)
    assert fields_of(check_problem(answer, 422, code)) == [field]


def test_an_unknown_name_is_answered_with_the_known_ones(server: RunningServer) -> None:
    assert "lightning, hyper, base" in server.generate(model="turbo").json()["detail"]
    eras = server.generate(era="jurassic").json()["detail"]
    assert "wilderness" in eras
    assert "drone" in eras


@pytest.mark.parametrize(
    ("accept", "fields", "field"),
    [
        ("image/png", {"output_format": "jpeg"}, "output_format"),
        ("image/jpeg", {"use_jpeg": False}, "output_format"),
        ("image/png", {"num_images": 2}, "num_images"),
    ],
)
def test_accept_and_body_contradict(
    server: RunningServer, accept: str, fields: dict[str, Any], field: str
) -> None:
    body = {"prompt": "p", "width": 256, "height": 256} | fields
    answer = server.client.post("/generate", json=body, headers={"Accept": accept})
    assert fields_of(check_problem(answer, 422, "invalid_request")) == [field]


@pytest.mark.parametrize("accept", ["image/gif", "text/html", "image/png;q=0", "image/png;q=x"])
def test_nothing_acceptable(server: RunningServer, accept: str) -> None:
    answer = server.client.post("/generate", json={"prompt": "p"}, headers={"Accept": accept})
    check_problem(answer, 406, "not_acceptable")


# ---- bodies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b'{"prompt": "p"', 400),
        (b'{"prompt": "p"} x', 400),
        (b"prompt=p", 400),
        (b"null", 422),
        (b"[]", 422),
        (b'"p"', 422),
        (b'{"prompt": "p", "cfg": NaN}', 422),
        (b'{"prompt": "p", "cfg": Infinity}', 422),
        (b'{"prompt": "p", "cfg": -Infinity}', 422),
        (b'{"prompt": "p", "cfg": 1e999}', 422),
        (b'{"prompt": "p", "seed": NaN}', 422),
        (b'{"prompt": "p", "seed": 1e999}', 422),
        (b'{"prompt": "p", "steps": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "p", "cfg": ' + b"9" * 4000 + b"}", 422),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"prompt": "p", "loras": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, 400),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", 422),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b'{"prompt": "\xed\xa0\x80"}', 422),
        (b'{"prompt": "\\ud800"}', 422),
        (b'{"\\ud800": 1, "prompt": "p"}', 422),
        (b'{"prompt": "p", "model": "\\udfff"}', 422),
        (b'{"prompt": "a\\u0000b"}', 422),
        (b'{"prompt": "a\x00b"}', 400),
        (b'{"prompt": "' + b"x" * 1_000_000 + b'"}', 422),
        (b"\x00" * 100, 400),
        (b'{"prompt": "p", ' + b",".join(b'"k%d": 1' % i for i in range(5000)) + b"}", 422),
        (b'{"prompt": "p", "' + b"k" * 100_000 + b'": 1}', 422),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_hostile_json(server: RunningServer, content: bytes, status: int) -> None:
    answer = server.client.post("/generate", content=content, headers=JSON)
    check_problem(answer, status, "malformed_json" if status == 400 else "invalid_request")
    assert len(answer.content) < 10_000
    assert server.client.get("/ping").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/merge-patch+json"},
        {"Content-Type": "image/png"},
        JSON | {"Content-Encoding": "gzip"},
        JSON | {"Content-Encoding": "br"},
    ],
)
def test_bodies_that_are_not_plain_json(server: RunningServer, headers: dict[str, str]) -> None:
    bomb = zlib.compress(b"0" * 10_000_000)
    answer = server.client.post("/generate", content=bomb, headers=headers)
    check_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=utf-8",
        "Application/JSON;charset=UTF-8",
        'application/json; charset="Utf-8"',
    ],
)
def test_spellings_of_plain_json(server: RunningServer, content_type: str) -> None:
    answer = server.client.post(
        "/generate",
        content=b'{"prompt": "p", "width": 256, "height": 256}',
        headers={"Content-Type": content_type, "Content-Encoding": "identity"},
    )
    assert answer.status_code == 200


def test_a_body_over_the_limit(start_server: StartServer) -> None:
    server = start_server(max_body_mb=1)
    body = b'{"prompt": "' + b"x" * 1_200_000 + b'"}'

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for content in (body, chunks()):  # with its length announced, and without
        answer = server.client.post("/generate", content=content, headers=JSON)
        check_problem(answer, 413, "body_too_large")
        assert "1 MB" in answer.json()["detail"]
    assert server.generate().status_code == 200


def test_an_announced_length_over_the_limit_is_not_waited_for(start_server: StartServer) -> None:
    server = start_server(max_body_mb=1)
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port), timeout=10) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000001\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_at_the_limit_is_read(start_server: StartServer) -> None:
    server = start_server(max_body_mb=1)
    body = b'{"prompt": "p", "width": 256, "height": 256}'
    answer = server.client.post("/generate", content=body.ljust(1_000_000), headers=JSON)
    assert answer.status_code == 200


def test_paths_and_methods_that_do_not_exist(server: RunningServer) -> None:
    check_problem(server.client.get(f"/{CANARY}"), 404, "not_found")
    answer = server.client.get("/generate")
    check_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


# ---- depth maps -----------------------------------------------------------------------------


def png(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """Header and chunks as told, however wrong."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(b"\0" * 65)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def saved(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png(60_000, 60_000), id="bomb"),
        pytest.param(png(2**31 - 1, 2**31 - 1), id="larger bomb"),
        pytest.param(
            png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(b"a" * 100_000_000))), id="text bomb"
        ),
        pytest.param(saved(Image.new("L", (64, 64)), "PNG")[:-30], id="truncated png"),
        pytest.param(saved(Image.new("L", (64, 64)), "JPEG")[:-100], id="truncated jpeg"),
        pytest.param(saved(Image.new("L", (64, 64)), "WEBP")[:-10], id="truncated webp"),
        pytest.param(saved(Image.new("CMYK", (8, 8)), "JPEG"), id="cmyk"),
        pytest.param(saved(Image.new("L", (8, 8)), "GIF"), id="gif"),
        pytest.param(saved(Image.new("L", (8, 8)), "TIFF"), id="tiff"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="svg"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0", id="eps"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="signature only"),
    ],
)
def test_a_depth_map_that_cannot_be_used(server: RunningServer, content: bytes) -> None:
    text = base64.b64encode(content).decode()
    # never replaced by a mock, nor ignored where it would not act
    for fields in ({}, {"mock_depth": True}, {"controlnet_strength": 0}):
        problem = check_problem(server.generate(depth_map_b64=text, **fields), 422, "bad_depth_map")
        assert fields_of(problem) == ["depth_map_b64"]


# ---- the engine -----------------------------------------------------------------------------


def failing(at: str, error: Exception) -> FakeRunner:
    def fault(operation: str, requests: list[GenerationRequest]) -> None:
        if operation == at and (not requests or requests[0].prompt == "poison"):
            raise error

    return FakeRunner(fault=fault)


@pytest.mark.parametrize(
    ("at", "error", "status", "code"),
    [
        ("admit", BadAdapterError("loras", "It belongs to another model."), 422, "bad_weights"),
        ("prepare", RuntimeError(CANARY), 500, "generation_failed"),
        ("predict", ZeroDivisionError(CANARY), 500, "generation_failed"),
        ("predict", MemoryError(CANARY), 503, "out_of_memory"),
        ("advance", DeviceMemoryError("Too large."), 503, "out_of_memory"),
        ("decode", NanOutputError("Not a number."), 500, "nan_output"),
    ],
)
def test_a_failure_of_the_engine(
    start_server: StartServer, at: str, error: Exception, status: int, code: str
) -> None:
    server = start_server(failing(at, error))
    answer = server.generate(prompt="poison")
    check_problem(answer, status, code)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert server.generate().status_code == 200
    outcome = "refused" if status == 503 else "failed"
    counted = f'controlnet_images_total{{model="lightning",outcome="{outcome}"}} 1.0'
    assert counted in server.client.get("/metrics").text.splitlines()


def test_a_model_that_cannot_be_loaded(start_server: StartServer) -> None:
    server = start_server(failing("load", BadWeightsError("model.safetensors is damaged.")))
    check_problem(server.generate(), 500, "bad_weights")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DownloadError("The origin does not answer."), 502, "download_failed"),
        (BadWeightsError("Not safetensors."), 500, "bad_weights"),
        (DiskFullError("No room in MODELS_DIR."), 507, "disk_full"),
    ],
)
def test_a_file_that_cannot_be_had(
    start_server: StartServer, error: Exception, status: int, code: str
) -> None:
    store = FakeStore()
    store.lacks("sdxl_small", error)
    server = start_server(store=store)
    check_problem(server.generate(mock_depth=True), status, code)
    assert server.generate().status_code == 200  # without depth it is not needed


def test_a_full_queue(start_server: StartServer) -> None:
    store = FakeStore()
    store.lacks("hyper")
    server = start_server(FakeRunner(step_s=0.1), store, queue_capacity=4)
    with ThreadPoolExecutor() as pool:
        accepted = pool.submit(server.generate, num_images=4, steps=20)
        wait_until(lambda: server.engine.health().queue_depth == 4)
        started_s = time.monotonic()
        refused = [server.generate(model="hyper") for _ in range(10)]
        assert (time.monotonic() - started_s) / 10 < 0.1
        for answer in refused:
            check_problem(answer, 429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        assert accepted.result().status_code == 200
    assert store.fetched == []  # nothing costly is begun for those who cannot be served
    assert server.generate().status_code == 200
    # more than ever fit: another try would be in vain
    never = check_problem(server.generate(num_images=5), 422, "invalid_request")
    assert fields_of(never) == ["num_images"]
    assert "at most 4" in never["detail"]


def test_a_deadline_passes_in_the_queue(start_server: StartServer) -> None:
    server = start_server(FakeRunner(step_s=0.1), request_timeout_s=0.5, max_batch_rows=2)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.generate, steps=15)
        wait_until(lambda: len(server.runner.batches) > 0)
        late = server.client.post(
            "/generate",
            # more steps than the first has left, which therefore goes on
            json={"prompt": "p", "width": 256, "height": 256, "steps": 20},
            headers={"X-Request-ID": "late"},
        )
        check_problem(late, 504, "deadline_exceeded")
        assert first.result().status_code == 200  # has begun: it may take its time
    assert not any("late" in batch for batch in server.runner.batches)


# ---- what the operator is told --------------------------------------------------------------


@contextmanager
def told(event: str = "problem_answered") -> Iterator[list[Any]]:
    """The events of that name, with the ids that the log file would show."""
    found: list[Any] = []
    with_ids = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=with_ids) as events:
        yield found
    found += [one for one in events if one["event"] == event]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NanOutputError("Not a number."), "nan_output"),
        (DeviceMemoryError("Too large."), "out_of_memory"),
    ],
)
def test_a_fault_is_logged_once_with_code_and_reason(
    start_server: StartServer, error: Exception, code: str
) -> None:
    server = start_server(failing("decode", error))
    with told() as events:
        request_id = server.generate(prompt="poison").headers["x-request-id"]
    [event] = events
    assert (event["log_level"], event["request_id"]) == ("error", request_id)
    assert (event["code"], event["reason"]) == (code, str(error))


def test_the_cause_of_a_fault_is_in_the_log_and_not_in_the_answer(
    start_server: StartServer,
) -> None:
    error, cause = DownloadError("The origin does not answer."), OSError(CANARY)
    error.__cause__ = cause
    store = FakeStore()
    store.lacks("lightning", error)
    with told() as events:
        check_problem(start_server(store=store).generate(), 502, "download_failed")
    [event] = events
    assert event["exc_info"] is cause


def test_a_late_request_is_a_fault_but_a_busy_server_is_none(start_server: StartServer) -> None:
    server = start_server(FakeRunner(step_s=0.1), request_timeout_s=0.5, max_batch_rows=2)
    with told() as events, ThreadPoolExecutor() as pool:
        first = pool.submit(server.generate, steps=15)
        wait_until(lambda: len(server.runner.batches) > 0)
        busy = server.client.post("/unload", params={"model_key": "lightning"})
        check_problem(busy, 503, "model_busy")
        check_problem(server.generate(steps=20), 504, "deadline_exceeded")
        server.generate(steps=99)
        assert first.result().status_code == 200
    assert [event["code"] for event in events] == ["deadline_exceeded"]


def test_a_preload_that_fails_shows_no_path_of_the_server(start_server: StartServer) -> None:
    store = FakeStore()
    store.lacks("lightning", PermissionError(13, "Permission denied", f"/srv/{CANARY}"))
    server = start_server(store=store, preload_model="lightning")
    wait_until(lambda: server.client.get("/checkhealth").json()["last_error"] is not None)
    assert server.client.get("/checkhealth").json()["last_error"] == "Permission denied"


# ---- ids, and what nobody foresaw -----------------------------------------------------------


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 64])
def test_the_clients_request_id_is_kept(server: RunningServer, given: str) -> None:
    answer = server.client.get("/ping", headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a/b", "<x>", "\u00e9"])
def test_an_unusable_request_id_is_replaced(server: RunningServer, given: str) -> None:
    answer = server.client.get("/ping", headers=[(b"X-Request-ID", given.encode())])
    new = answer.headers["x-request-id"]
    assert len(new) == 32
    assert int(new, 16)


def test_the_request_id_reaches_engine_and_metadata(server: RunningServer) -> None:
    answer = server.client.post(
        "/generate",
        json={"prompt": "p", "width": 256, "height": 256},
        headers={"X-Request-ID": "trace-1"},
    )
    assert answer.json()["metadata"]["request_id"] == "trace-1"
    assert ["trace-1"] in server.runner.batches


class BrokenStore(FakeStore):
    def path(self, source: Any) -> NoReturn:
        raise ZeroDivisionError(CANARY)


def test_an_error_that_nobody_foresaw(start_server: StartServer) -> None:
    server = start_server(store=BrokenStore())
    with structlog.testing.capture_logs() as events:
        check_problem(server.generate(), 500, "internal_error")
    [event] = [event for event in events if event["event"] == "request_crashed"]
    assert CANARY in event["reason"]
    assert event["code"] == "internal_error"
    assert isinstance(event["exc_info"], ZeroDivisionError)
    assert server.client.get("/ping").status_code == 200


def test_the_published_schema(server: RunningServer) -> None:
    schema = server.client.get("/openapi.json").json()
    assert schema["paths"].keys() == {
        *("/generate", "/ping", "/checkhealth", "/models", "/preload", "/unload", "/metrics")
    }
    responses = schema["paths"]["/generate"]["post"]["responses"]
    assert responses["200"]["content"].keys() == {
        *("application/json", "image/png", "image/jpeg", "image/webp")
    }
    for status in ("400", "413", "415", "422", "429", "500", "503", "504", "507"):
        assert list(responses[status]["content"]) == ["application/problem+json"]
    fields = schema["components"]["schemas"]["ControlNetGenerateData"]["properties"]
    optional = [name for name in fields if name != "prompt"]
    assert all({"type": "null"} in fields[name]["anyOf"] for name in optional)
    assert "servers" not in schema


def test_the_schema_names_the_address_that_was_set(start_server: StartServer) -> None:
    server = start_server(model_server_url="https://images.test/")
    assert server.client.get("/openapi.json").json()["servers"] == [{"url": "https://images.test"}]


def test_the_documentation_page(server: RunningServer) -> None:
    assert "openapi.json" in server.client.get("/docs").text
