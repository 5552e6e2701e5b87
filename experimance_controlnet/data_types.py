"""The wire contract: what clients send and what they get back. Pydantic only.

This module does not know the catalogue (which names exist) nor the engine (how an image is made):
``server/resolve.py`` turns a validated request into work.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict

from experimance_controlnet.defaults import DEFAULT_CONTROLNET, DEFAULT_MODEL

SchedulerName = Literal[
    "auto", "euler", "dpm_sde", "euler_a", "dpm_multi", "dpm_single", "ddim", "lcm"
]
ImageFormat = Literal["png", "jpeg", "webp"]
ResponseFormat = Literal["json", "binary"]

Name = Annotated[str, Field(min_length=1, max_length=64)]
PromptText = Annotated[str, Field(max_length=2000)]


def _optional_fields_accept_null(schema: JsonDict) -> None:
    """In the published schema: null is allowed wherever a default exists."""
    properties = schema["properties"]
    required = schema.get("required", [])
    assert isinstance(properties, dict) and isinstance(required, list)
    for name, field in properties.items():
        assert isinstance(field, dict)
        if name in required or {"type": "null"} in field.get("anyOf", []):  # type: ignore[operator]
            continue
        kept: JsonDict = {
            key: field.pop(key) for key in ("title", "description", "default") if key in field
        }
        properties[name] = {"anyOf": [dict(field), {"type": "null"}], **kept}


class _FromClient(BaseModel):
    """Null means the default; unknown fields are refused."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, json_schema_extra=_optional_fields_accept_null
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class LoraUse(_FromClient):
    """One adapter asked for by name."""

    name: Name = Field(description="A LoRA of the catalogue.")
    strength: float = Field(1.0, ge=0, le=2, description="Factor on the adapter's weights.")


class ControlNetGenerateData(_FromClient):
    """The body of ``POST /generate``. Null means the default; unknown fields are refused."""

    prompt: PromptText = Field(
        min_length=1,
        description="What to paint. `(word:1.3)` weighs a part; longer than 77 tokens is fine.",
    )
    negative_prompt: PromptText | None = Field(None, description="What to avoid.")
    depth_map_b64: str | None = Field(
        None,
        description="Depth map: base64 or data URL of a PNG, JPEG or WebP; 16-bit grey, or 8-bit "
        "grey or colour; up to 8192 pixels a side, 4096 x 4096 in all; near is bright.",
    )
    mock_depth: bool = Field(False, description="Without a depth map, draw a radial one.")
    model: Name = Field(DEFAULT_MODEL, description="A model of the catalogue.")
    era: Name | None = Field(None, description="An era, or a LoRA name, of the catalogue.")
    loras: list[LoraUse] = Field(
        default_factory=list,
        max_length=8,
        description="Adapters on top of the era's own; where a name occurs in both, they add up.",
    )
    steps: int | None = Field(None, ge=1, le=50, description="Default: the model's own.")
    cfg: float | None = Field(
        None, ge=0.1, le=20, description="Guidance scale; <= 1 means none. Default: the model's."
    )
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="Default: random.")
    lora_strength: float = Field(1.0, ge=0, le=2, description="Factor on the era's own weights.")
    controlnet_strength: float = Field(0.8, ge=0, le=2, description="0 ignores the depth map.")
    control_guidance_start: float = Field(
        0.0, ge=0, le=1, description="Share of the steps after which ControlNet begins to act."
    )
    control_guidance_end: float = Field(
        1.0, ge=0, le=1, description="Share of the steps after which ControlNet stops."
    )
    scheduler: SchedulerName = Field("auto", description="Noise scheduler; auto: the model's own.")
    use_karras_sigmas: bool | None = Field(None, description="Default: the scheduler's own choice.")
    width: int = Field(1024, ge=256, le=2048, multiple_of=64, description="Pixels.")
    height: int = Field(1024, ge=256, le=2048, multiple_of=64, description="Pixels.")
    num_images: int = Field(1, ge=1, le=8, description="Image i uses seed + i.")
    output_format: ImageFormat | None = Field(None, description="Default: png.")
    quality: int = Field(90, ge=1, le=100, description="For jpeg and webp.")
    response_format: ResponseFormat = Field(
        "json", description="`binary`: the body is the image, the metadata travels in headers."
    )
    controlnet: Name = Field(DEFAULT_CONTROLNET, description="A ControlNet of the catalogue.")
    use_jpeg: bool | None = Field(
        None, description="Older spelling of output_format: true is jpeg, false is png."
    )
    enable_deepcache: bool = Field(
        False, description="Permits step caching; the metadata say whether it was used."
    )

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _no_nul(cls, text: str | None) -> str | None:
        if text is not None and "\0" in text:
            raise ValueError("must not contain NUL characters")
        return text

    @field_validator("loras")
    @classmethod
    def _no_duplicate_loras(cls, loras: list[LoraUse]) -> list[LoraUse]:
        if len({lora.name for lora in loras}) < len(loras):
            raise ValueError("must not name the same LoRA twice")
        return loras

    @model_validator(mode="after")
    def _fields_agree(self) -> ControlNetGenerateData:
        if self.control_guidance_start > self.control_guidance_end:
            raise ValueError("control_guidance_start must not be above control_guidance_end")
        older = {True: "jpeg", False: "png", None: None}[self.use_jpeg]
        if older and self.output_format and older != self.output_format:
            raise ValueError("use_jpeg contradicts output_format; send only output_format")
        if self.response_format == "binary" and self.num_images > 1:
            raise ValueError("a binary response carries one image; use num_images 1 or json")
        return self

    @property
    def wanted_format(self) -> ImageFormat | None:
        """What the client asked for in either spelling; None where it left the choice."""
        if self.use_jpeg is not None:
            return "jpeg" if self.use_jpeg else "png"
        return self.output_format


class PhaseTimes(BaseModel):
    """Where the time of one image went, in seconds."""

    queue_s: float = Field(description="From acceptance to the first work on the device.")
    encode_s: float = Field(description="Prompts and depth map to tensors.")
    denoise_s: float = Field(description="All steps, waiting for others between them included.")
    decode_s: float = Field(description="Latents to pixels.")
    encode_image_s: float = Field(description="Pixels to the file format.")
    total_s: float = Field(description="From acceptance to the encoded image.")


class LoraApplied(BaseModel):
    """One adapter with the weight it was merged at: era weight x lora_strength + explicit."""

    name: str
    weight: float


class ControlApplied(BaseModel):
    """The depth conditioning that was really applied."""

    controlnet: str
    strength: float
    start: float
    end: float
    depth: Literal["given", "mock"]
    depth_sha256: str | None = Field(description="Of the given file's bytes; null for a mock.")


class MemoryUse(BaseModel):
    """Memory in use, MiB."""

    ram_mb: float
    gpu_memory: dict[str, float] | None = Field(
        description="allocated_mb, reserved_mb, total_mb; null without a GPU."
    )


class GenerationMetadata(BaseModel):
    """What was really applied to one image: enough to make it again."""

    request_id: str
    prompt: str
    negative_prompt: str | None
    model: str
    model_hash: str | None = Field(description="sha256 of the weights, where it is known.")
    era: str | None
    era_alternative: bool = Field(
        description="True where the era's own LoRAs cannot be had and its stated alternative ran."
    )
    lora_strength: float
    requested_loras: list[LoraUse] = Field(description="The request's own, beside the era's.")
    loras: list[LoraApplied] = Field(description="Adapters with their final weights.")
    steps: int
    cfg: float
    seed: int
    scheduler: str = Field(description="Class of the noise scheduler.")
    scheduler_name: SchedulerName = Field(description="Its name in a request; never auto.")
    use_karras_sigmas: bool
    width: int
    height: int
    control: ControlApplied | None = Field(description="Null: plain text to image.")
    prompt_tokens: int
    negative_prompt_tokens: int
    deepcache_used: bool = False
    workload: float = Field(description="Units of the whole request; see workload.py.")
    queue_time: float = Field(description="Seconds; the same as times.queue_s.")
    times: PhaseTimes
    precision: str = Field(
        description="What the models computed in: fp32 (a CPU), fp16, or fp8 (the UNet's widest "
        "products, the rest in fp16)."
    )
    memory: MemoryUse
    notes: list[str] = Field(
        default_factory=list,
        description="What had to be done differently. Decoded again in full precision: vae_fp32. "
        "For want of memory: decoded in tiles, vae_tiled; not computed beside others, batch_split; "
        "graphs and idle models dropped, memory_released; parts moved to the host, offloaded.",
    )
    server_version: str


class GenerateResponse(BaseModel):
    """The JSON answer of ``POST /generate``."""

    success: Literal[True] = True
    image_b64: str
    images_b64: list[str] | None = Field(None, description="All images, where num_images > 1.")
    error_message: None = None
    generation_time: float = Field(description="Seconds from acceptance to the encoded images.")
    seed_used: int
    model_used: str
    era_used: str | None
    metadata: GenerationMetadata = Field(description="Of the first image.")
    images_metadata: list[GenerationMetadata] | None = Field(
        None, description="Of every image, where num_images > 1."
    )


class Problem(BaseModel):
    """The one body of every error: ``application/problem+json`` (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    success: Literal[False] = False
    error_message: str = Field(description="Same as detail, for clients of the older shape.")
    errors: list[dict[str, str]] | None = Field(
        None, description="For 422: each wrong field with its reason."
    )


class EntryInfo(BaseModel):
    """Where an entry of the catalogue is."""

    on_disk: bool = Field(description="All its files are; false: the first request fetches them.")
    in_memory: bool
    size_bytes: int | None = Field(
        description="Of all its files; null where they are not on disk and the catalogue does not "
        "say it."
    )
    unavailable: str | None = Field(
        description="Why its files could not be had the last time; null where they are on disk, or "
        "nobody has tried."
    )


class FileInfo(EntryInfo):
    """An entry with weights of its own."""

    sha256: str | None = Field(
        description="Of the weights; of a folder over their names and hashes. Null until it is "
        "known: nothing is read for this answer."
    )


class ModelInfo(FileInfo):
    """One model of the catalogue, with the settings it was made for."""

    steps: int
    cfg: float
    scheduler: str
    scheduler_config: dict[str, bool | int | float | str]


class ControlNetInfo(FileInfo):
    """One ControlNet of the catalogue."""


class LoraInfo(FileInfo):
    """One LoRA of the catalogue."""

    weight: float = Field(description="What it has as an era: the author's recommendation.")


class EraInfo(EntryInfo):
    """One era of the catalogue; where it is speaks of the LoRAs that it would use now."""

    adapters: dict[str, float] = Field(description="LoRAs with their weights.")
    alternative: dict[str, float] | None = Field(
        description="What runs instead where an adapter's file does not exist at its origin."
    )
    uses_alternative: bool = Field(description="That is so at the moment.")


class ModelsResponse(BaseModel):
    """The answer of ``GET /models``."""

    available_models: list[str]
    available_eras: list[str]
    available_schedulers: list[str]
    available_loras: list[str]
    available_controlnets: list[str]
    models: dict[str, ModelInfo]
    controlnets: dict[str, ControlNetInfo]
    loras: dict[str, LoraInfo]
    eras: dict[str, EraInfo] = Field(
        description="Without the LoRAs, which can be asked for as eras too."
    )


class ModelActionResponse(BaseModel):
    """The answer of ``POST /preload`` and ``POST /unload``."""

    status: Literal["success"] = "success"
    message: str
    loaded_models: list[str]


class DownloadStatus(BaseModel):
    """A transfer that runs."""

    name: str = Field(description="Where it will be, below MODELS_DIR.")
    done_bytes: int = Field(description="On disk, those of an earlier transfer included.")
    total_bytes: int | None = Field(description="Null as long as the origin has not said it.")
    bytes_per_s: float = Field(description="Of the last seconds.")


ServerStatus = Literal["starting", "loading_models", "ready", "draining", "error"]


class LoadUnderWay(BaseModel):
    """A model, ControlNet or LoRA that is wanted and on its way to the device."""

    kind: Literal["model", "controlnet", "lora"]
    name: str
    source: Literal["disk", "host"] = Field(
        description="host: it waits in the host's memory since it had to leave the GPU."
    )
    seconds: float | None = Field(
        description="Since its load began; null while it waits for its turn, or for room."
    )
    share: float | None = Field(
        description="How much of its bytes is there, about, 0 to 1; null where that is not known."
    )


class HealthResponse(BaseModel):
    """The answer of ``GET /checkhealth``; 503 where ``model_server_healthy`` is false."""

    status: ServerStatus
    model_server_healthy: bool
    ready_for_inference: bool
    models_loaded: list[str]
    models_parked: list[str] = Field(
        description="Not on the GPU, but in the host's memory: they come back without the disk."
    )
    loading: list[LoadUnderWay] = Field(description="What comes next first.")
    memory_usage: MemoryUse
    uptime: float = Field(description="Seconds since the start.")
    queue_depth: int = Field(description="Images accepted and not yet finished.")
    queue_workload: float = Field(description="Workload units of those.")
    last_error: str | None
    downloads: list[DownloadStatus] = Field(
        default_factory=list, description="The transfers of model files that run."
    )
    device: str = Field(
        description="Its name; MODEL_DEVICE in the first seconds, while the engine starts."
    )
    precision: str = Field(
        description="fp32, fp16 or fp8; PRECISION in the first seconds, while the engine starts."
    )
    memory_tier: str = Field(
        description="How much of a model stays on the GPU: resident, parked or minimal; "
        "MEMORY_TIER in the first seconds, while the engine starts."
    )
    version: str


class PingResponse(BaseModel):
    """The answer of ``GET /ping``."""

    status: Literal["ok"] = "ok"
