"""The runner that makes SDXL images: owns the device, the modules on it and all tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from experimance_controlnet.catalog.specs import Catalog, ModelSpec, Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine import denoise
from experimance_controlnet.engine.checkpoint import load_checkpoint, load_controlnet
from experimance_controlnet.engine.conditioning import depth_to_control
from experimance_controlnet.engine.graphs import Recorder
from experimance_controlnet.engine.lora import load_lora
from experimance_controlnet.engine.model import SdxlModel
from experimance_controlnet.engine.network.unet import ControlNetwork
from experimance_controlnet.engine.precision import Precision, choose_precision
from experimance_controlnet.engine.request import (
    Asset,
    BatchKey,
    GenerationRequest,
    PhaseTimer,
    RequestState,
)
from experimance_controlnet.engine.residency import (
    ACTIVATION_BYTES,
    ResidentModels,
    free_memory_bytes,
)
from experimance_controlnet.engine.runner import GpuMemory
from experimance_controlnet.engine.vae import Frame
from experimance_controlnet.engine.warmup import WarmUps
from experimance_controlnet.errors import ModelFileError, SettingsError


class _Pace:
    """Keeps the host one step ahead of the device, and no further: enough that the device never
    waits, little enough that a new request joins at the next step but one.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._step_before: torch.cuda.Event | None = None

    def step_launched(self) -> None:
        """Wait for the step before this one."""
        if not self._on_cuda:
            return
        event = torch.cuda.Event()
        event.record()
        if self._step_before is not None:
            self._step_before.synchronize()
        self._step_before = event


def choose_device(wish: str) -> torch.device:
    """``auto`` is CUDA where there is one. ``wish`` is ``auto``, ``cuda`` or ``cpu``.

    Raises:
        SettingsError: CUDA is wished for and there is none.
    """
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available():
        raise SettingsError("MODEL_DEVICE (--model-device): there is no CUDA device here")
    return torch.device(wish)


class SdxlRunner:
    """See :class:`experimance_controlnet.engine.runner.Runner`."""

    def __init__(
        self,
        catalog: Catalog,
        store: ModelStore,
        device: str = "auto",
        precision: str | Precision = "auto",
    ) -> None:
        """The store holds the files already: fetching them is not the runner's job.

        ``precision``: a wish, see :func:`choose_precision`, or one that is taken as it is.

        Raises:
            SettingsError: there is no such device, or it cannot compute in that precision.
        """
        self._catalog = catalog
        self._store = store
        self._device = choose_device(device)
        if isinstance(precision, str):
            precision = choose_precision(precision, self._device)
        self._precision = precision
        self._dtype = precision.dtype
        self._models: ResidentModels[SdxlModel] = ResidentModels(
            free_bytes=lambda: free_memory_bytes(self._device), release=self.release_memory
        )
        self._controlnets: dict[str, ControlNetwork] = {}
        self._recorder = Recorder(self._device)
        self._pace = _Pace(self._device)
        self._warm_ups = WarmUps(self)

    @property
    def device_name(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return "cpu"

    @property
    def precision(self) -> str:
        return self._precision.name

    @property
    def loaded_models(self) -> tuple[str, ...]:
        return self._models.names

    def gpu_memory(self) -> GpuMemory | None:
        if self._device.type != "cuda":
            return None
        return GpuMemory(
            allocated_bytes=torch.cuda.memory_allocated(self._device),
            reserved_bytes=torch.cuda.memory_reserved(self._device),
            total_bytes=torch.cuda.mem_get_info(self._device)[1],
        )

    # ---- models -----------------------------------------------------------------------------

    def missing(self, request: GenerationRequest) -> Asset | None:
        wanted = [Asset("model", request.model, request.model)]
        if request.control is not None:
            wanted.append(Asset("controlnet", request.control.controlnet, request.model))
        wanted += [Asset("lora", adapter.name, request.model) for adapter in request.adapters]
        return next((asset for asset in wanted if not self.has(asset)), None)

    def has(self, asset: Asset) -> bool:
        match asset.kind:
            case "model":
                return asset.name in self._models.names
            case "controlnet":
                return asset.name in self._controlnets
            case "lora":
                return asset.name in self._models.peek(asset.model).adapters

    def make_room(self, asset: Asset, in_use: Collection[str]) -> None:
        path = self._file(self._source(asset))
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        weights_bytes = sum(file.stat().st_size for file in files)
        self._models.make_room(weights_bytes + ACTIVATION_BYTES, in_use)

    def load(self, asset: Asset) -> Any:
        path = self._file(self._source(asset))
        match asset.kind:
            case "model":
                return self._load_model(self._catalog.models[asset.name], path)
            case "controlnet":
                return ControlNetwork(load_controlnet(path, self._device, self._dtype))
            case "lora":
                modules = self._models.peek(asset.model).modules
                return load_lora(asset.name, path, modules, self._device)

    def _load_model(self, spec: ModelSpec, path: Path) -> SdxlModel:
        base = self._file(spec.base_source) if spec.base_source else None
        modules = load_checkpoint(path, base, self._device, self._dtype)
        return SdxlModel(spec, modules, self._recorder, self._precision)

    def install(self, asset: Asset, loaded: Any) -> None:
        match asset.kind:
            case "model":
                self._models.add(asset.name, loaded)
                self._plan_warm_up(asset.name)
            case "controlnet":
                self._controlnets[asset.name] = loaded
                for model in self._models.names:
                    self._plan_warm_up(model)
            case "lora":
                self._models.peek(asset.model).adapters[asset.name] = loaded

    def unload(self, model: str) -> None:
        self._models.drop(model)

    def _source(self, asset: Asset) -> Source:
        match asset.kind:
            case "model":
                return self._catalog.models[asset.name].source
            case "controlnet":
                return self._catalog.controlnets[asset.name].source
            case "lora":
                return self._catalog.loras[asset.name].source

    def _file(self, source: Source) -> Path:
        path = self._store.path(source)
        if path is None:
            name = source.uri.rpartition("/")[2]
            raise ModelFileError(f"The files of {name} are not on this server's disk.")
        return path

    # ---- requests ---------------------------------------------------------------------------

    def admit(self, request: GenerationRequest, accepted_s: float) -> RequestState:
        model = self._models.use(request.model)
        chunks = model.token_chunks(request)
        key = BatchKey(request.model, request.adapters, request.width, request.height, chunks)
        return RequestState(
            request=request,
            key=key,
            timer=PhaseTimer(accepted_s),
            scheduler=model.scheduler(request),
            generator=torch.Generator("cpu").manual_seed(request.seed),
        )

    @torch.inference_mode()
    def prepare(self, state: RequestState) -> None:
        request = state.request
        model = self._models.use(request.model)
        # what keeps the device busy first, what the host has to compute last
        features = self._control_features(request)
        state.conditioning = model.condition(request, state.key.token_chunks, features)
        state.latents = model.noise(state)

    def _control_features(self, request: GenerationRequest) -> torch.Tensor | None:
        if request.control is None:
            return None
        depth, size = request.control.depth, (request.height, request.width)
        image = depth_to_control(depth, *size, self._device, self._dtype)
        return self._controlnets[request.control.controlnet].features(image)

    @torch.inference_mode()
    def predict(self, states: Sequence[RequestState]) -> list[torch.Tensor]:
        model = self._models.use(states[0].key.model)
        predictions = model.predict(states, self._controlnets)
        self._pace.step_launched()
        return predictions

    @torch.inference_mode()
    def advance(self, state: RequestState, prediction: torch.Tensor) -> None:
        denoise.advance(state, prediction)

    @torch.inference_mode()
    def decode(self, state: RequestState) -> Frame:
        assert state.latents is not None, "decode() comes after the last step"
        return self._models.use(state.request.model).decode(state.latents)

    def warm_up(self) -> bool:
        return self._warm_ups.do_one_piece()

    def _plan_warm_up(self, model: str) -> None:
        if self._device.type == "cuda":  # elsewhere nothing is compiled or recorded
            self._warm_ups.plan(model, next(iter(self._controlnets), None))

    def release_memory(self) -> None:
        for name in self._models.names:
            self._models.peek(name).release_memory()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
