from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from experimance_controlnet.data_types import ControlNetGenerateData
from experimance_controlnet.engine.request import Adapter
from experimance_controlnet.errors import InvalidRequestError, UnknownNameError
from experimance_controlnet.server.resolve import Plan, make_plan
from experimance_controlnet.workload import workload
from tests.http.conftest import make_catalog, source

CATALOG = make_catalog()
DEPTH = np.zeros((4, 4), dtype=np.float32)


def plan(absent: set[str] | None = None, **fields: Any) -> Plan:
    data = ControlNetGenerateData.model_validate({"prompt": "p"} | fields)
    return make_plan(data, CATALOG, {source(name) for name in absent or ()})


def uris(made: Plan) -> list[str]:
    return [one.uri.rpartition("/")[2].removesuffix(".safetensors") for one in made.sources]


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, {}),
        ({"era": "modern"}, {"drone": 0.3, "experimance": 0.6}),
        ({"era": "modern", "lora_strength": 0.5}, {"drone": 0.15, "experimance": 0.3}),
        ({"era": "modern", "lora_strength": 0}, {}),
        # a LoRA's own name brings the weight that its author recommends
        ({"era": "drone"}, {"drone": 0.8}),
        ({"era": "drone", "lora_strength": 1.5}, {"drone": 1.2}),
        # explicit ones are added, and lora_strength does not touch them
        ({"loras": [{"name": "drone"}]}, {"drone": 1.0}),
        (
            {"era": "modern", "lora_strength": 2, "loras": [{"name": "drone", "strength": 0.5}]},
            {"drone": 1.1, "experimance": 1.2},
        ),
        ({"loras": [{"name": "experimance"}, {"name": "drone"}]}, {"drone": 1, "experimance": 1}),
        ({"loras": [{"name": "drone", "strength": 0}]}, {}),
        # sums of floats do not tell equal sets apart
        (
            {"era": "modern", "loras": [{"name": "experimance", "strength": 0.1}]},
            {"drone": 0.3, "experimance": 0.7},
        ),
    ],
)
def test_adapters(fields: dict[str, Any], weights: dict[str, float]) -> None:
    adapters = plan(**fields).adapters
    assert adapters == tuple(sorted(adapters))
    assert {adapter.name: adapter.weight for adapter in adapters} == weights


@pytest.mark.parametrize(
    ("absent", "fields", "alternative", "adapters"),
    [
        (set(), {}, False, (Adapter("experimance_wilderness", 1.0),)),
        ({"drone"}, {}, False, (Adapter("experimance_wilderness", 1.0),)),
        (
            {"experimance_wilderness"},
            {"lora_strength": 0.5},
            True,
            (Adapter("drone", 0.4), Adapter("experimance", 0.2)),
        ),
        # no alternative is stated: the error belongs to the client
        (
            {"drone"},
            {"era": "modern"},
            False,
            (Adapter("drone", 0.3), Adapter("experimance", 0.6)),
        ),
        (
            {"experimance_wilderness"},
            {"era": "experimance_wilderness"},
            False,
            (Adapter("experimance_wilderness", 1.0),),
        ),
    ],
)
def test_an_era_whose_files_cannot_be_had(
    absent: set[str], fields: dict[str, Any], alternative: bool, adapters: tuple[Adapter, ...]
) -> None:
    made = plan(absent, **{"era": "wilderness"} | fields)
    assert (made.era_alternative, made.adapters) == (alternative, adapters)


@pytest.mark.parametrize(
    ("fields", "steps", "cfg", "scheduler"),
    [
        ({}, 6, 2.0, "euler"),
        ({"model": "base"}, 20, 7.5, "dpm_sde"),
        ({"model": "base", "scheduler": "auto"}, 20, 7.5, "dpm_sde"),
        ({"steps": 1, "cfg": 0.1, "scheduler": "lcm"}, 1, 0.1, "lcm"),
    ],
)
def test_defaults_are_the_models(
    fields: dict[str, Any], steps: int, cfg: float, scheduler: str
) -> None:
    made = plan(**fields)
    assert (made.steps, made.cfg, made.scheduler) == (steps, cfg, scheduler)


@pytest.mark.parametrize(
    ("fields", "depth"),
    [
        ({}, None),
        ({"mock_depth": True}, "mock"),
        ({"depth_map_b64": "x"}, "given"),
        ({"depth_map_b64": "x", "mock_depth": True}, "given"),
        ({"depth_map_b64": "x", "controlnet_strength": 0}, None),
        # acts in no step at all
        ({"mock_depth": True, "control_guidance_end": 0}, None),
        ({"mock_depth": True, "control_guidance_start": 0.4, "control_guidance_end": 0.45}, None),
        ({"mock_depth": True, "control_guidance_start": 0.5}, "mock"),
    ],
)
def test_what_steers(fields: dict[str, Any], depth: str | None) -> None:
    made = plan(**fields)
    assert made.depth == depth
    [request] = made.requests("r", DEPTH, 1.0)
    assert (request.control is None) == (depth is None)
    assert ("sdxl_small" in uris(made)) == (depth is not None)


def test_the_control_of_a_request() -> None:
    made = plan(
        mock_depth=True,
        controlnet_strength=1.5,
        control_guidance_start=0.25,
        control_guidance_end=0.75,
    )
    [request] = made.requests("r", DEPTH, 1.0)
    assert request.control is not None
    assert request.control.depth is DEPTH
    assert request.control.controlnet == "sdxl_small"
    control = request.control
    assert (control.strength, control.start, control.end) == (1.5, 0.25, 0.75)


def test_the_requests_of_several_images() -> None:
    made = plan(num_images=3, seed=2**32 - 1, negative_prompt="n", use_karras_sigmas=True)
    requests = made.requests("r", None, 12.5)
    assert [request.seed for request in requests] == [2**32 - 1, 0, 1]
    assert {request.deadline_s for request in requests} == {12.5}
    assert {request.request_id for request in requests} == {"r"}
    assert {request.negative_prompt for request in requests} == {"n"}
    assert {request.use_karras_sigmas for request in requests} == {True}
    assert sum(request.workload for request in requests) == pytest.approx(made.workload)


def test_seeds_are_drawn_where_none_is_given() -> None:
    seeds = {plan().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert plan(seed=0).seed == 0


def test_the_workload_is_of_what_is_applied() -> None:
    made = plan(mock_depth=True, era="modern", num_images=2, control_guidance_end=0.5)
    assert made.workload == workload(
        width=1024,
        height=1024,
        steps=6,
        cfg=2.0,
        depth=True,
        num_images=2,
        control_end=0.5,
        adapters=2,
    )
    assert plan(mock_depth=True).workload == 100
    assert plan(mock_depth=True, controlnet_strength=0).workload == plan().workload < 100


def test_the_files_that_are_needed() -> None:
    assert uris(plan()) == ["lightning", "base"]
    assert uris(plan(model="hyper", mock_depth=True, era="modern")) == [
        *("hyper", "sdxl_small", "drone", "experimance")
    ]


@pytest.mark.parametrize(
    ("fields", "field", "known"),
    [
        ({"model": "turbo"}, "model", "lightning, hyper, base"),
        ({"era": "jurassic"}, "era", "wilderness, modern, drone"),
        ({"controlnet": "canny"}, "controlnet", "sdxl_small"),
        ({"loras": [{"name": "drone"}, {"name": "turbo"}]}, "loras.1.name", "drone, experimance"),
    ],
)
def test_unknown_names(fields: dict[str, Any], field: str, known: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        plan(**fields)
    assert caught.value.field == field
    assert known in caught.value.message
    for unknown in ("turbo", "jurassic", "canny"):
        assert unknown not in caught.value.message


def test_a_catalogue_without_the_default_controlnet() -> None:
    bare = replace(CATALOG, controlnets={})
    unused: list[dict[str, Any]] = [{}, {"controlnet": None}]
    unused += [{"mock_depth": True, "controlnet_strength": 0}]
    for fields in unused:
        data = ControlNetGenerateData.model_validate({"prompt": "p"} | fields)
        assert make_plan(data, bare).controlnet is None
    # one that is needed, or asked for, is looked up
    for fields in ({"mock_depth": True}, {"controlnet": "sdxl_small"}):
        data = ControlNetGenerateData.model_validate({"prompt": "p"} | fields)
        with pytest.raises(UnknownNameError, match="none at all") as caught:
            make_plan(data, bare)
        assert caught.value.field == "controlnet"


@pytest.mark.parametrize(
    ("fields", "karras"),
    [
        ({}, False),
        ({"use_karras_sigmas": True}, True),
        ({"scheduler": "dpm_sde"}, True),
        ({"scheduler": "dpm_sde", "use_karras_sigmas": False}, False),
        ({"scheduler": "ddim"}, False),
        ({"model": "base"}, True),
    ],
)
def test_karras_sigmas_default_to_the_schedulers(fields: dict[str, Any], karras: bool) -> None:
    [request] = plan(**fields).requests("r", None, 1.0)
    assert request.use_karras_sigmas is karras


def test_a_null_strength_of_a_lora_is_the_default() -> None:
    nulled = plan(loras=[{"name": "drone", "strength": None}])
    assert nulled.adapters == (Adapter("drone", 1.0),)


@pytest.mark.parametrize("scheduler", ["ddim", "lcm", "euler_a"])
def test_karras_sigmas_of_a_scheduler_that_has_none(scheduler: str) -> None:
    with pytest.raises(InvalidRequestError, match="dpm_multi, dpm_sde") as caught:
        plan(scheduler=scheduler, use_karras_sigmas=True)
    assert caught.value.field == "use_karras_sigmas"
    assert plan(scheduler=scheduler, use_karras_sigmas=False).scheduler == scheduler
