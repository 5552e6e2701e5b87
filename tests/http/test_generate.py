"""What a good request gets."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
from PIL import Image

from experimance_controlnet import __version__
from experimance_controlnet.data_types import ControlNetGenerateData, GenerateResponse
from experimance_controlnet.engine.fake import FakeRunner
from experimance_controlnet.engine.request import GenerationRequest, RequestState
from experimance_controlnet.engine.schedulers import make_scheduler
from experimance_controlnet.errors import NotFoundUpstreamError
from tests.http.conftest import FakeStore, RunningServer, StartServer, source, wait_until

SMALL = {"prompt": "hills", "width": 256, "height": 256}


def colour_of(seed: int) -> tuple[int, int, int]:
    """Of the flat image that FakeRunner makes."""
    return (seed % 251 + 1, 128, 64)


def opened(image_b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image_b64)))


def depth_b64() -> str:
    file = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def user_comment(image: Image.Image) -> Any:
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"ASCII\0\0\0")
    return json.loads(comment[8:])


def test_the_example_of_the_documentation(server: RunningServer) -> None:
    answer = server.client.post(
        "/generate",
        json={
            "prompt": "A majestic mountain landscape",
            "negative_prompt": "blurry, low quality",
            "mock_depth": True,
            "model": "lightning",
            "era": "wilderness",
            "steps": 6,
            "cfg": 2.0,
            "width": 1024,
            "height": 1024,
        },
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = GenerateResponse.model_validate_json(answer.content)
    assert body.success
    assert body.error_message is None
    assert body.images_b64 is None
    assert (body.model_used, body.era_used) == ("lightning", "wilderness")
    image = opened(body.image_b64)
    assert (image.format, image.size) == ("PNG", (1024, 1024))
    assert image.getpixel((0, 0)) == colour_of(body.seed_used)
    # the standard request plus one adapter
    assert 100 < body.metadata.workload < 101


def test_metadata_say_what_was_applied(server: RunningServer) -> None:
    body = server.generate(
        seed=7, mock_depth=True, era="wilderness", lora_strength=0.5, negative_prompt="fog"
    ).json()
    metadata = body["metadata"]
    assert (
        metadata.items()
        >= {
            "prompt": "hills",
            "negative_prompt": "fog",
            "model": "lightning",
            "model_hash": f"hash of {source('lightning').uri}",
            "era": "wilderness",
            "era_alternative": False,
            "loras": [{"name": "experimance_wilderness", "weight": 0.5}],
            "steps": 6,
            "cfg": 2.0,
            "seed": 7,
            "scheduler": "EulerDiscreteScheduler",
            "use_karras_sigmas": False,
            "width": 256,
            "height": 256,
            "control": {
                "controlnet": "sdxl_small",
                "strength": 0.8,
                "start": 0.0,
                "end": 1.0,
                "depth": "mock",
                "depth_sha256": None,
            },
            "scheduler_name": "euler",
            "lora_strength": 0.5,
            "requested_loras": [],
            "deepcache_used": False,
            "precision": "fp32",
            "notes": [],
            "server_version": __version__,
        }.items()
    )
    times = metadata["times"]
    assert metadata["queue_time"] == times["queue_s"]
    assert 0 < times["encode_image_s"] <= times["total_s"] <= body["generation_time"]
    assert metadata["memory"]["ram_mb"] > 10
    assert metadata["memory"]["gpu_memory"] is None


class Recorder(FakeRunner):
    """Keeps the requests that reach the engine, and lays their schedulers out as they say."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[GenerationRequest] = []

    def admit(self, request: GenerationRequest, accepted_s: float) -> RequestState:
        self.requests.append(request)
        state = super().admit(request, accepted_s)
        karras = request.use_karras_sigmas
        state.scheduler = make_scheduler(request.scheduler, {}, request.steps, karras)
        return state


@pytest.fixture(scope="module")
def recording(start_server: StartServer) -> RunningServer:
    store = FakeStore()
    store.lacks("experimance_wilderness", NotFoundUpstreamError("There is no such file."))
    return start_server(Recorder(), store)


def body_of(metadata: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """The request for a picture like this one; ``files`` are depth maps by their sha256."""
    body = {
        name: metadata[name]
        for name in (
            *("prompt", "negative_prompt", "model", "era", "lora_strength", "steps", "cfg"),
            *("seed", "use_karras_sigmas", "width", "height"),
        )
    }
    body |= {"scheduler": metadata["scheduler_name"], "loras": metadata["requested_loras"]}
    control = metadata["control"]
    if control is not None:
        body |= {
            "controlnet": control["controlnet"],
            "controlnet_strength": control["strength"],
            "control_guidance_start": control["start"],
            "control_guidance_end": control["end"],
            "mock_depth": control["depth"] == "mock",
            "depth_map_b64": files.get(control["depth_sha256"]),
        }
    return body


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "base", "negative_prompt": ""},
        {"model": "hyper", "scheduler": "dpm_sde", "use_karras_sigmas": False},
        {"scheduler": "ddim", "steps": 9, "cfg": 0.7, "seed": 0},
        {"scheduler": "dpm_multi", "use_karras_sigmas": True, "num_images": 3},
        {
            "era": "modern",
            "lora_strength": 0.3,
            "loras": [{"name": "drone", "strength": 0.1}, {"name": "experimance"}],
        },
        {"era": "wilderness", "lora_strength": 1.7},  # whose alternative applies
        {"depth_map_b64": depth_b64(), "controlnet_strength": 1.3, "control_guidance_start": 0.2},
        {"mock_depth": True, "control_guidance_end": 0.7, "height": 512},
        {"mock_depth": True, "controlnet_strength": 0},
    ],
)
def test_a_picture_can_be_made_again_from_its_metadata_alone(
    recording: RunningServer, fields: dict[str, Any]
) -> None:
    assert isinstance(recording.runner, Recorder)
    first = recording.generate(**fields).json()
    last = (first.get("images_b64") or [first["image_b64"]])[-1]
    original = recording.runner.requests[-1]
    metadata = json.loads(opened(last).info["generation"])
    depth = base64.b64decode(depth_b64())
    again = recording.client.post(
        "/generate",
        json=body_of(metadata, {hashlib.sha256(depth).hexdigest(): depth_b64()}),
        headers={"X-Request-ID": metadata["request_id"]},
    )
    assert again.status_code == 200, again.text
    repeated = recording.runner.requests[-1]
    assert original is not repeated
    if original.control is not None:
        assert repeated.control is not None
        np.testing.assert_array_equal(original.control.depth, repeated.control.depth)
        repeated = replace(
            repeated, control=replace(repeated.control, depth=original.control.depth)
        )
    # the queue's own: when it would have been too late, and one image's share of several
    share = original.workload if "num_images" in fields else repeated.workload
    assert replace(repeated, deadline_s=original.deadline_s, workload=share) == original


def test_null_means_the_default(server: RunningServer) -> None:
    fields = set(ControlNetGenerateData.model_fields) - {"prompt", "seed", "width", "height"}
    every_null = server.generate(seed=3, **dict.fromkeys(fields)).json()
    minimal = server.generate(seed=3).json()
    volatile = {"request_id", "queue_time", "times", "memory"}
    assert {k: v for k, v in every_null["metadata"].items() if k not in volatile} == {
        k: v for k, v in minimal["metadata"].items() if k not in volatile
    }
    assert set(every_null) == set(minimal)


def test_the_size_defaults_to_1024(server: RunningServer) -> None:
    body = server.client.post("/generate", json={"prompt": "p", "width": None}).json()
    assert opened(body["image_b64"]).size == (1024, 1024)


@pytest.mark.parametrize(
    ("model", "steps", "cfg", "scheduler", "karras"),
    [
        ("lightning", 6, 2.0, "EulerDiscreteScheduler", False),
        ("hyper", 8, 6.0, "EulerDiscreteScheduler", False),
        ("base", 20, 7.5, "DPMSolverMultistepScheduler", True),
    ],
)
def test_each_model_has_its_own_defaults(
    server: RunningServer, model: str, steps: int, cfg: float, scheduler: str, karras: bool
) -> None:
    metadata = server.generate(model=model).json()["metadata"]
    assert (metadata["steps"], metadata["cfg"]) == (steps, cfg)
    assert (metadata["scheduler"], metadata["use_karras_sigmas"]) == (scheduler, karras)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"mock_depth": True}, "mock"),
        ({"depth_map_b64": depth_b64()}, "given"),
        ({"depth_map_b64": f"data:image/png;base64,{depth_b64()}"}, "given"),
        ({"depth_map_b64": depth_b64(), "mock_depth": True}, "given"),
        ({"mock_depth": True, "controlnet_strength": 0}, None),
    ],
)
def test_control_says_what_steered(
    server: RunningServer, fields: dict[str, Any], expected: str | None
) -> None:
    control = server.generate(**fields).json()["metadata"]["control"]
    assert (control and control["depth"]) == expected


def test_several_images_count_the_seed_up(server: RunningServer) -> None:
    body = server.generate(num_images=3, seed=2**32 - 2).json()
    seeds = [2**32 - 2, 2**32 - 1, 0]
    assert body["seed_used"] == seeds[0]
    assert [one["seed"] for one in body["images_metadata"]] == seeds
    assert body["metadata"] == body["images_metadata"][0]
    assert body["image_b64"] == body["images_b64"][0]
    pixels = [opened(image).getpixel((5, 5)) for image in body["images_b64"]]
    assert pixels == [colour_of(seed) for seed in seeds]


def test_without_a_seed_each_request_gets_its_own(server: RunningServer) -> None:
    seeds = {server.generate().json()["seed_used"] for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "image_format"),
    [
        ({}, "PNG"),
        ({"output_format": "png"}, "PNG"),
        ({"output_format": "jpeg"}, "JPEG"),
        ({"output_format": "webp", "quality": 50}, "WEBP"),
        ({"use_jpeg": True}, "JPEG"),
        ({"use_jpeg": False}, "PNG"),
        ({"use_jpeg": True, "output_format": "jpeg"}, "JPEG"),
    ],
)
def test_formats_and_the_metadata_inside_them(
    server: RunningServer, fields: dict[str, Any], image_format: str
) -> None:
    body = server.generate(prompt="fjäll 🏔", seed=1, **fields).json()
    image = opened(body["image_b64"])
    assert image.format == image_format
    inside = json.loads(image.info["generation"]) if image_format == "PNG" else user_comment(image)
    expected = body["metadata"]
    del expected["times"]["encode_image_s"], expected["times"]["total_s"]
    assert inside == expected


def test_quality_reaches_the_encoder(server: RunningServer) -> None:
    tables = [
        opened(server.generate(output_format="jpeg", quality=quality).json()["image_b64"])
        for quality in (10, 95)
    ]
    assert sum(tables[0].quantization[0]) > sum(tables[1].quantization[0])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("accept", "fields", "media_type"),
    [
        ("image/png", {}, "image/png"),
        ("image/jpeg", {}, "image/jpeg"),
        ("image/webp", {}, "image/webp"),
        ("image/jpeg", {"output_format": "jpeg"}, "image/jpeg"),
        ("image/webp, image/png;q=0.5", {"output_format": "png"}, "image/png"),
        ("image/*", {"use_jpeg": True}, "image/jpeg"),
        ("image/*", {}, "image/png"),
        ("image/png;q=0.2, image/webp", {}, "image/webp"),
        ("*/*", {"response_format": "binary"}, "image/png"),
        ("application/json", {"response_format": "binary", "output_format": "webp"}, "image/webp"),
        ("*/*", {}, "application/json"),
        ("application/json, image/png;q=0.9", {}, "application/json"),
        ("text/html, */*;q=0.1", {}, "application/json"),
        ("image/png", {"response_format": "json"}, "image/png"),
    ],
)
def test_accept_chooses_the_body(
    server: RunningServer, accept: str, fields: dict[str, Any], media_type: str
) -> None:
    answer = server.client.post("/generate", json=SMALL | fields, headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type


def test_a_binary_answer_carries_its_metadata_in_headers(server: RunningServer) -> None:
    answer = server.generate(response_format="binary", prompt="secret-prompt", seed=9)
    image = Image.open(io.BytesIO(answer.content))
    assert (image.format, image.getpixel((0, 0))) == ("PNG", colour_of(9))
    assert answer.headers["x-seed-used"] == "9"
    header = answer.headers["x-generation-metadata"]
    metadata = json.loads(header)
    assert (metadata["seed"], metadata["steps"], metadata["model"]) == (9, 6, "lightning")
    assert metadata["times"]["total_s"] > 0
    assert header.isascii()
    assert "prompt" not in metadata
    assert "secret-prompt" not in header


def test_files_are_fetched_on_first_use(start_server: StartServer) -> None:
    store = FakeStore()
    needed = {"lightning", "base", "sdxl_small", "drone", "experimance"}
    for name in needed | {"hyper", "experimance_wilderness"}:
        store.lacks(name)
    server = start_server(store=store)
    for _ in range(2):
        assert server.generate(era="modern", mock_depth=True).status_code == 200
    assert sorted(one.uri for one in store.fetched) == sorted(source(name).uri for name in needed)


def test_an_era_without_its_lora_uses_the_stated_alternative(start_server: StartServer) -> None:
    store = FakeStore()
    store.lacks("experimance_wilderness", NotFoundUpstreamError("There is no such file."))
    server = start_server(store=store)
    for _ in range(2):
        body = server.generate(era="wilderness", lora_strength=0.5).json()
        assert body["era_used"] == "wilderness"
        assert body["metadata"]["era_alternative"]
        assert body["metadata"]["loras"] == [
            {"name": "drone", "weight": 0.4},
            {"name": "experimance", "weight": 0.2},
        ]
    assert len(store.fetched) == 1  # remembered
    # asked for by its own name, nothing may stand in for it
    refused = server.generate(era="experimance_wilderness")
    assert (refused.status_code, refused.json()["code"]) == (502, "not_found_upstream")


def test_one_log_event_a_request_without_the_prompt(server: RunningServer) -> None:
    with structlog.testing.capture_logs() as events:
        answer = server.generate(prompt="canary-prompt", negative_prompt="canary-too", seed=5)
        # written when the answer is out; so the event of the test before may still come
        wait_until(lambda: any(event.get("seed") == 5 for event in events))
    [event] = [event for event in events if event.get("seed") == 5]
    assert event["event"] == "request_done"
    assert (
        event.items()
        >= {
            "log_level": "info",
            "route": "/generate",
            "method": "POST",
            "status": 200,
            "model": "lightning",
            "era": None,
            "size": "256x256",
            "steps": 6,
            "seed": 5,
        }.items()
    )
    phases = {"queue_s", "encode_s", "denoise_s", "decode_s", "encode_image_s", "total_s"}
    assert event.keys() >= phases | {"workload", "ram_mb"}
    assert answer.json()["metadata"]["workload"] == event["workload"]
    assert "canary" not in str(events)


def test_metrics_count_what_was_done(start_server: StartServer) -> None:
    server = start_server()
    answer = server.generate(num_images=2)
    server.generate(steps=99)
    server.client.get("/nowhere")
    last = 'controlnet_requests_total{route="unmatched",status="404"} 1.0'
    wait_until(lambda: last in server.client.get("/metrics").text)  # counted after the answer
    lines = server.client.get("/metrics").text.splitlines()
    for line in (
        'controlnet_requests_total{route="/generate",status="200"} 1.0',
        'controlnet_requests_total{route="/generate",status="422"} 1.0',
        last,
        'controlnet_images_total{model="lightning",outcome="completed"} 2.0',
        'controlnet_phase_seconds_count{phase="denoise"} 2.0',
        'controlnet_phase_seconds_count{phase="total"} 2.0',
        "controlnet_queue_depth 0.0",
        "controlnet_queue_workload_units 0.0",
        'controlnet_model_loaded{model="lightning"} 1.0',
        'controlnet_model_loads_total{model="lightning",source="disk"} 1.0',
    ):
        assert line in lines
    values = dict(line.rsplit(" ", 1) for line in lines)
    units = answer.json()["metadata"]["workload"]
    assert float(values["controlnet_workload_units_total"]) == pytest.approx(units, abs=1e-3)
    assert float(values["controlnet_ram_bytes"]) > 1e7
