"""Everything an operator can set: one class, one default each.

A setting is an environment variable of the field's name in capitals (``MODEL_SERVER_PORT``) and a
flag of the same name (``--model-server-port``); the flag wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic_settings
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from experimance_controlnet.errors import SettingsError
from experimance_controlnet.folders import DEFAULT_MODELS_DIR, per_user_folder, why_unusable
from experimance_controlnet.logs import errors_log


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _not_empty(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be empty")  # a Path would read it as the current folder
    return value


LogLevel = Annotated[
    Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)
]
Device = Annotated[Literal["auto", "cuda", "cpu"], BeforeValidator(_lower)]
Precision = Annotated[Literal["auto", "fp16", "fp8"], BeforeValidator(_lower)]
Tier = Annotated[Literal["auto", "resident", "parked", "minimal"], BeforeValidator(_lower)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Fallback:
    """A default folder that cannot be used here, and the one that is used in its place."""

    variable: str
    wanted: Path
    used: Path


class Settings(BaseSettings):
    """Each flag is also an environment variable: --model-log is MODEL_LOG. The flag wins."""

    model_config = SettingsConfigDict(extra="ignore", cli_hide_none_type=True)

    model_server_host: str = Field("0.0.0.0", min_length=1, description="Address to listen on.")
    model_server_port: int = Field(
        5001, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )
    model_server_url: str = Field(
        "http://0.0.0.0:5001",
        description="Where others reach the server. Where it is not set: the address listened on.",
    )
    models_dir: Path = Field(
        DEFAULT_MODELS_DIR, description="Folder of the downloaded model files."
    )
    model_log: Path = Field(
        Path("/workspace/logs/model_server.log"),
        description="Log file, JSON lines; errors go to *.errors.log beside it as well.",
    )
    preload_model: str = Field(
        "lightning",
        description="Models to load at the start, separated by commas; empty or none: no model.",
    )
    log_level: LogLevel = Field("info", description="What is logged, in any case.")
    model_catalog: str = Field(
        "experimance",
        min_length=1,
        description="experimance, embedded (tiny models, no download), or a TOML file.",
    )
    model_device: Device = Field("auto", description="Where the models run.")
    precision: Precision = Field(
        "auto",
        description="What they compute in. auto: fp16 on a GPU. fp8: faster and less exact, for "
        "GPUs of compute capability 8.9 or later.",
    )
    memory_tier: Tier = Field(
        "auto",
        description="How much stays on the GPU. resident: all, the fastest. parked: text encoders "
        "and unmerged copies wait in the host's memory. minimal: also without graphs, large "
        "pictures decoded in tiles. auto: the fastest that the GPU has memory for.",
    )
    memory_limit_gb: float = Field(
        0.0,
        ge=0,
        le=10_000,
        allow_inf_nan=False,
        description="GPU memory that the server may take in all, GB; 0: what is free.",
    )
    queue_capacity: int = Field(
        64, ge=1, le=100_000, description="Images that may wait; beyond that: 429."
    )
    max_batch_rows: int = Field(
        8, ge=1, le=64, description="UNet rows a batch may have; guidance takes two an image."
    )
    request_timeout_s: Seconds = Field(
        120.0, description="Seconds a request may wait for its first step; beyond that: 504."
    )
    watchdog_s: Seconds = Field(
        120.0, description="Seconds without a heartbeat after which the engine counts as hung."
    )
    shutdown_grace_s: Seconds = Field(
        30.0, description="Seconds that accepted requests get when the server is told to stop."
    )
    max_body_mb: int = Field(32, ge=1, le=1024, description="Size limit of a request's body, MB.")

    _fallbacks: tuple[Fallback, ...] = PrivateAttr(default=())

    _paths = field_validator("models_dir", "model_log", mode="before")(_not_empty)

    @field_validator("model_server_url")
    @classmethod
    def _is_http_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must be a URL like http://host:port")
        return url.rstrip("/")

    @property
    def preload_models(self) -> tuple[str, ...]:
        """Names of the models to load at the start, in order, each once."""
        names = [name.strip() for name in self.preload_model.split(",")]
        return tuple(dict.fromkeys(name for name in names if name and name.lower() != "none"))

    @property
    def memory_limit_bytes(self) -> int | None:
        """None: no limit."""
        return round(self.memory_limit_gb * 10**9) or None

    @property
    def explicit_url(self) -> str | None:
        """MODEL_SERVER_URL where the operator has set it to something that can be reached."""
        if "model_server_url" not in self.model_fields_set:
            return None
        everywhere = urlsplit(self.model_server_url).hostname in ("0.0.0.0", "::")
        return None if everywhere else self.model_server_url

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """The folders that are not where their defaults say."""
        return self._fallbacks


def load_settings(argv: Sequence[str], per_user: Path | None = None) -> Settings:
    """Flags, then environment variables, then defaults; the folders exist and can be written.

    ``per_user`` takes the default folders where ``/workspace`` cannot be written (default: the
    platform's place for a user's data). ``--help`` prints and raises SystemExit.

    Raises:
        SettingsError: one line that names the variable and the flag.
    """
    try:
        flags = CliSettingsSource[Settings](
            Settings,
            cli_prog_name="model_server.py",
            cli_parse_args=list(argv),
            cli_kebab_case=True,
            cli_exit_on_error=False,
        )
        settings = Settings(_cli_settings_source=flags)
    except pydantic_settings.SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise SettingsError(f"{_one_line(reason)}; --help lists the flags") from error
    except ValidationError as error:
        raise SettingsError(_first_fault(error)) from error
    return settle_folders(settings, per_user or per_user_folder())


def settle_folders(settings: Settings, per_user: Path) -> Settings:
    """Make MODELS_DIR, and MODEL_LOG with its folder, or fall back to ``per_user``.

    Only a default may be replaced: a path that the operator named is used or refused.

    Raises:
        SettingsError: a named path, or the one to fall back to, cannot be written.
    """
    substitutes = {
        "models_dir": per_user / "models",
        "model_log": per_user / "logs" / settings.model_log.name,
    }
    changes: dict[str, Path] = {}
    fallbacks: list[Fallback] = []
    for field, substitute in substitutes.items():
        wanted: Path = getattr(settings, field)
        problem = _unusable(field, wanted)
        if problem is not None and field not in settings.model_fields_set:
            fallbacks.append(Fallback(field.upper(), wanted, substitute))
            changes[field] = substitute
            problem = _unusable(field, substitute)
        if problem is not None:
            raise SettingsError(f"{_both_names(field)}: {problem}")
    settled = settings.model_copy(update=changes)
    settled._fallbacks = tuple(fallbacks)
    return settled


def _unusable(field: str, path: Path) -> str | None:
    """Why nothing can be written there; None where it can."""
    if field != "model_log":
        return why_unusable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        errors_log(path).open("a").close()
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return why_unusable(path.parent)


def _first_fault(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    reason = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(others)} more)" if others else ""
    field = str(first["loc"][0])
    return f"{_both_names(field)}: {_one_line(repr(first['input']))}: {reason}{more}"


def _both_names(field: str) -> str:
    return f"{field.upper()} (--{field.replace('_', '-')})"


def _one_line(text: str) -> str:
    return " ".join(text.split())
