from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experimance_controlnet.errors import SettingsError
from experimance_controlnet.folders import default_models_dir
from experimance_controlnet.settings import Fallback, Settings, load_settings, settle_folders


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of ours, but for the folders: the defaults belong to a rented machine."""
    for field in Settings.model_fields:
        monkeypatch.delenv(field.upper(), raising=False)
    monkeypatch.setenv("MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("MODEL_LOG", str(tmp_path / "logs" / "server.log"))


VALUES: list[tuple[str, str, Any]] = [
    ("model_server_url", "https://images.test:8000", "https://images.test:8000"),
    ("model_server_host", "127.0.0.1", "127.0.0.1"),
    ("model_server_port", "8000", 8000),
    ("preload_model", "hyper,base", "hyper,base"),
    ("log_level", "DeBug", "debug"),
    ("model_catalog", "embedded", "embedded"),
    ("model_device", "CPU", "cpu"),
    ("precision", "FP8", "fp8"),
    ("memory_tier", "Parked", "parked"),
    ("memory_limit_gb", "11.5", 11.5),
    ("queue_capacity", "3", 3),
    ("max_batch_rows", "2", 2),
    ("request_timeout_s", "1.5", 1.5),
    ("watchdog_s", "7", 7.0),
    ("shutdown_grace_s", "9", 9.0),
    ("max_body_mb", "64", 64),
]


def test_defaults() -> None:
    settings = load_settings([])
    assert settings.model_dump(exclude={"models_dir", "model_log"}) == {
        "model_server_url": "http://0.0.0.0:5001",
        "model_server_host": "0.0.0.0",
        "model_server_port": 5001,
        "preload_model": "lightning",
        "log_level": "info",
        "model_catalog": "experimance",
        "model_device": "auto",
        "precision": "auto",
        "memory_tier": "auto",
        "memory_limit_gb": 0.0,
        "queue_capacity": 64,
        "max_batch_rows": 8,
        "request_timeout_s": 120.0,
        "watchdog_s": 120.0,
        "shutdown_grace_s": 30.0,
        "max_body_mb": 32,
    }
    assert Settings.model_fields["models_dir"].default == Path("/workspace/models")
    assert Settings.model_fields["model_log"].default == Path("/workspace/logs/model_server.log")


def test_no_memory_limit_is_none() -> None:
    assert load_settings([]).memory_limit_bytes is None
    assert load_settings(["--memory-limit-gb", "8"]).memory_limit_bytes == 8_000_000_000


def test_the_table_covers_every_setting() -> None:
    assert {name for name, _, _ in VALUES} | {"models_dir", "model_log"} == set(
        Settings.model_fields
    )


@pytest.mark.parametrize(("field", "text", "value"), VALUES)
def test_each_is_a_variable_and_a_flag(
    monkeypatch: pytest.MonkeyPatch, field: str, text: str, value: Any
) -> None:
    flag = f"--{field.replace('_', '-')}"
    assert getattr(load_settings([flag, text]), field) == value
    assert getattr(load_settings([f"{flag}={text}"]), field) == value
    monkeypatch.setenv(field.upper(), text)
    assert getattr(load_settings([]), field) == value


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_SERVER_PORT", "6000")
    assert load_settings(["--model-server-port", "7000"]).model_server_port == 7000


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("model_server_port", "x"),
        ("model_server_port", "65536"),
        ("model_server_port", "-1"),
        ("model_server_port", ""),
        ("model_server_host", ""),
        ("model_server_url", "images.test"),
        ("model_server_url", "ftp://images.test"),
        ("model_server_url", "http://"),
        ("model_server_url", "http://host:99999"),
        ("log_level", "loud"),
        ("model_device", "tpu"),
        ("precision", "fp32"),
        ("model_catalog", ""),
        ("models_dir", ""),
        ("model_log", ""),
        ("model_log", " "),
        ("model_log", "/"),
        ("model_log", str(Path(__file__).parent)),
        ("queue_capacity", "0"),
        ("max_batch_rows", "0"),
        ("request_timeout_s", "0"),
        ("request_timeout_s", "nan"),
        ("watchdog_s", "-1"),
        ("shutdown_grace_s", "inf"),
        ("max_body_mb", "0"),
        ("max_body_mb", "a\nb"),
    ],
)
@pytest.mark.parametrize("as_flag", [True, False])
def test_a_bad_value_is_one_line_that_names_both(
    monkeypatch: pytest.MonkeyPatch, field: str, text: str, as_flag: bool
) -> None:
    flag = f"--{field.replace('_', '-')}"
    if not as_flag:
        monkeypatch.setenv(field.upper(), text)
    with pytest.raises(SettingsError) as caught:
        load_settings([f"{flag}={text}"] if as_flag else [])
    assert caught.value.message.startswith(f"{field.upper()} ({flag}): ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("argv", [["--port", "1"], ["x"], ["--model-server-port"], ["--model-s=1"]])
def test_a_bad_command_line_is_one_line(argv: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(argv)
    assert argv[0].partition("=")[0] in caught.value.message
    assert "--help" in caught.value.message
    assert "\n" not in caught.value.message


def test_help_lists_each_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert f"{field.description} (default: {field.default})" in text


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("lightning", ("lightning",)),
        ("lightning, hyper,,lightning", ("lightning", "hyper")),
        ("", ()),
        ("none", ()),
        ("None", ()),
        (" ", ()),
    ],
)
def test_models_to_preload(
    monkeypatch: pytest.MonkeyPatch, text: str, models: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PRELOAD_MODEL", text)
    assert load_settings([]).preload_models == models
    assert load_settings([f"--preload-model={text}"]).preload_models == models


@pytest.mark.parametrize(
    ("argv", "url"),
    [
        ([], None),
        (["--model-server-url", "http://images.test/"], "http://images.test"),
        (["--model-server-url", "http://0.0.0.0:8000"], None),  # says nothing about where
    ],
)
def test_the_address_that_others_use(argv: list[str], url: str | None) -> None:
    assert load_settings(argv).explicit_url == url


# ---- folders --------------------------------------------------------------------------------


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A path below which nothing can be made, even by root."""
    file = tmp_path / "file"
    file.touch()
    return file / "below"


def test_folders_are_made(tmp_path: Path) -> None:
    settings = load_settings([])
    assert settings.models_dir == tmp_path / "models"
    assert settings.models_dir.is_dir()
    assert settings.model_log.parent.is_dir()
    assert settings.fallbacks == ()


@pytest.mark.parametrize("flag", ["--models-dir", "--model-log"])
def test_a_named_folder_that_cannot_be_written(blocked: Path, flag: str) -> None:
    variable = flag[2:].replace("-", "_").upper()
    with pytest.raises(SettingsError, match="cannot be written") as caught:
        load_settings([flag, str(blocked / "x")])
    assert caught.value.message.startswith(f"{variable} ({flag}): ")


def test_defaults_that_cannot_be_written_fall_back(blocked: Path, tmp_path: Path) -> None:
    log = blocked / "model_server.log"
    on_a_laptop = Settings.model_construct(_fields_set=set(), models_dir=blocked, model_log=log)
    per_user = tmp_path / "user"
    settings = settle_folders(on_a_laptop, per_user)
    assert settings.models_dir == per_user / "models"
    assert settings.model_log == per_user / "logs" / "model_server.log"
    assert settings.models_dir.is_dir()
    assert settings.model_log.parent.is_dir()
    assert settings.fallbacks == (
        Fallback("MODELS_DIR", blocked, settings.models_dir),
        Fallback("MODEL_LOG", log, settings.model_log),
    )


def test_commands_look_where_the_server_would(blocked: Path, tmp_path: Path) -> None:
    for wanted in (tmp_path, tmp_path / "new" / "models", blocked, blocked / "models"):
        log = tmp_path / "x.log"
        unset = Settings.model_construct(_fields_set=set(), models_dir=wanted, model_log=log)
        before = set(tmp_path.rglob("*"))
        found = default_models_dir(wanted, tmp_path / "user")
        assert set(tmp_path.rglob("*")) == before
        assert found == settle_folders(unset, tmp_path / "user").models_dir


def test_nowhere_to_fall_back_to(blocked: Path, tmp_path: Path) -> None:
    on_a_laptop = Settings.model_construct(
        _fields_set=set(), models_dir=blocked, model_log=tmp_path / "x.log"
    )
    with pytest.raises(SettingsError, match=r"^MODELS_DIR \(--models-dir\): "):
        settle_folders(on_a_laptop, blocked)


# ---- the launcher ---------------------------------------------------------------------------

PACKAGE = Path(sys.modules[Settings.__module__].__file__ or "").parent


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["model_server.py"], PACKAGE),
        (["-m", "experimance_controlnet.model_server"], PACKAGE.parent),
        (["-m", "experimance_controlnet.cli", "serve"], PACKAGE.parent),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["--help"], 0, None),
        (["--model-server-port", "x"], 2, "MODEL_SERVER_PORT (--model-server-port): 'x': "),
        (["--what"], 2, "unrecognized arguments: --what"),
        (
            ["--model-catalog", "/no/such.toml"],
            2,
            "MODEL_CATALOG (--model-catalog): /no/such.toml: ",
        ),
        (["--model-log", "/"], 2, "MODEL_LOG (--model-log): / cannot be written: Is a directory"),
        (["--models-dir="], 2, "MODELS_DIR (--models-dir): "),
        (
            ["--model-catalog=embedded", "--model-server-host=a..b"],
            2,
            "MODEL_SERVER_HOST (--model-server-host): ",
        ),
        (["--preload-model", "turbo"], 2, "PRELOAD_MODEL (--preload-model): "),
    ],
)
def test_what_the_launcher_says(
    command: list[str], folder: Path, arguments: list[str], status: int, line: str | None
) -> None:
    ended = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,  # were it to serve
    )
    assert ended.returncode == status
    if line is None:
        assert "--model-server-port" in ended.stdout
        assert ended.stderr == ""
    else:
        assert ended.stderr.startswith(f"model_server: {line}")
        assert ended.stderr.count("\n") == 1
        assert ended.stdout == ""


def test_what_the_launcher_does_not_import() -> None:
    """Torch takes seconds."""
    code = "import sys, experimance_controlnet.model_server; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True)
    assert ended.stdout.strip() == b"False"
