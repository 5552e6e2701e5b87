"""A request can name what the catalogue holds, and nothing else: no path, no address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experimance_controlnet.catalog.store import ModelStore
from tests.http.conftest import RunningServer, StartServer
from tests.http.test_errors import check_problem, fields_of

HOSTILE = [
    "https://example.org/a.safetensors",
    "http://169.254.169.254/latest/meta-data",
    "hf://owner/repo",
    "gs://bucket/object",
    "file:///etc/passwd",
    "package:base",
    "/etc/passwd",
    "../../etc/passwd",
    "..",
    ".",
    "%2e%2e/%2e%2e/etc/passwd",
    "lightning/../base",
    "lightning\0",
    "\0",
    "lightning\n",
    " lightning",
    "Lightning",
    "lightning.safetensors",
    "ligh\u0442ning",  # a Cyrillic letter
    "models.lightning",
    "origin.test/lightning.safetensors",
]


@pytest.fixture(scope="module")
def empty(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> RunningServer:
    """Over a real store, whose folder would appear with the first thing that is fetched."""
    store = ModelStore(tmp_path_factory.mktemp("names") / "models")
    return start_server(store=store)


def assert_refused(server: RunningServer, answer: Any, field: str, name: str) -> None:
    problem = check_problem(answer, 422, "unknown_name")
    assert fields_of(problem) == [field]
    if "/" in name:
        assert name not in problem["detail"], "nothing of the client's is echoed"
    assert not Path(server.store.models_dir).exists()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_none(empty: RunningServer, name: str) -> None:
    for field, value in (("model", name), ("era", name), ("controlnet", name)):
        assert_refused(empty, empty.generate(mock_depth=True, **{field: value}), field, name)
    assert_refused(empty, empty.generate(loras=[{"name": name}]), "loras.0.name", name)
    for path, field in (("/preload", "model_name"), ("/unload", "model_key")):
        assert_refused(empty, empty.client.post(path, params={field: name}), field, name)


def test_names_that_are_percent_encoded_twice(empty: RunningServer) -> None:
    answer = empty.client.post("/preload?model_name=%252e%252e%252fetc")
    assert_refused(empty, answer, "model_name", "%2e%2e%2fetc")


@pytest.mark.parametrize("name", [3, ["lightning"], {"name": "lightning"}, "", "x" * 65])
def test_names_of_another_shape(empty: RunningServer, name: Any) -> None:
    for field in ("model", "era", "controlnet"):
        problem = check_problem(empty.generate(**{field: name}), 422, "invalid_request")
        assert fields_of(problem) == [field]
    check_problem(empty.generate(loras=[{"name": name}]), 422, "invalid_request")


@pytest.mark.parametrize("path", ["/models/../etc/passwd", "/models/lightning", "/models/%2e%2e/x"])
def test_there_are_no_paths_below_models(empty: RunningServer, path: str) -> None:
    check_problem(empty.client.get(path), 404, "not_found")
