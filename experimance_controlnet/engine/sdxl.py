"""The runner that makes SDXL images: owns the device, the modules on it and all tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine import denoise
from experimance_controlnet.engine.assets import AssetReader
from experimance_controlnet.engine.conditioning import depth_to_control
from experimance_controlnet.engine.device import DeviceMemory, Pace, choose_device
from experimance_controlnet.engine.graphs import Recorder
from experimance_controlnet.engine.host_cache import HostCache, Parked
from experimance_controlnet.engine.host_memory import HostMemory
from experimance_controlnet.engine.lora import LoraFactors
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
from experimance_controlnet.engine.residency import Residency
from experimance_controlnet.engine.runner import GpuMemory, LoadSource, Stage
from experimance_controlnet.engine.tiers import PARKED, MemoryTier, choose_tier
from experimance_controlnet.engine.tiling import needs_tiles
from experimance_controlnet.engine.vae import Frame
from experimance_controlnet.engine.warmup import WarmUps


class SdxlRunner:
    """See :class:`experimance_controlnet.engine.runner.Runner`."""

    def __init__(
        self,
        catalog: Catalog,
        store: ModelStore,
        device: str = "auto",
        precision: str | Precision = "auto",
        tier: str | MemoryTier = "auto",
        memory_limit_bytes: int | None = None,
        host_cache: HostCache | None = None,
    ) -> None:
        """The store holds the files already: fetching them is not the runner's job.

        ``precision`` and ``tier``: wishes, see :func:`choose_precision` and :func:`choose_tier`, or
        taken as they are. ``memory_limit_bytes``: see :class:`DeviceMemory`. ``host_cache``: where
        what leaves the device waits; None: in the host's memory, unless the device is a CPU.

        Raises:
            SettingsError: there is no such device, or not with that precision or memory.
        """
        self._device = choose_device(device)
        self._memory = DeviceMemory(self._device, memory_limit_bytes)
        if isinstance(precision, str):
            precision = choose_precision(precision, self._device)
        self._precision = precision
        if isinstance(tier, str):
            tier = choose_tier(tier, self._memory.budget_bytes, precision)
        self._tier = tier
        self._recorder = Recorder(self._device, enabled=tier.records)
        self._reader = AssetReader(catalog, store, self._device, precision, tier, self._recorder)
        if host_cache is None and self._device.type == "cuda":
            host = HostMemory(self._device, tier.host_bytes)
            host_cache = HostCache(host.free_bytes, host.release, pin=True)
        self._host_cache = host_cache
        self._assets = Residency(
            self._memory.free_bytes, self._memory.release, self._forget, self._park
        )
        self._pace = Pace(self._device)
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
    def memory_tier(self) -> str:
        return self._tier.name

    @property
    def loaded_models(self) -> tuple[str, ...]:
        return self._assets.names("model")

    @property
    def parked_models(self) -> tuple[str, ...]:
        return () if self._host_cache is None else self._host_cache.names("model")

    def gpu_memory(self) -> GpuMemory | None:
        return self._memory.use()

    # ---- models, ControlNets, LoRAs ---------------------------------------------------------

    def missing(self, request: GenerationRequest) -> Asset | None:
        return next((asset for asset in request.assets if not self.has(asset)), None)

    def has(self, asset: Asset) -> bool:
        return asset in self._assets

    def source(self, asset: Asset) -> LoadSource:
        return "disk" if self._find_parked(asset) is None else "host"

    @property
    def load_share(self) -> float | None:
        return self._reader.share

    def make_room(self, asset: Asset, in_use: Collection[Asset]) -> bool:
        parked = self._find_parked(asset)
        if parked is None:
            needed_bytes = self._reader.needed_bytes(asset)
        else:
            needed_bytes = self._reader.bytes_to_wake(asset, parked)
        if self._host_cache is not None:
            self._host_cache.expect(asset)
        if self._memory.free_bytes() < needed_bytes:
            self.release_memory()  # graphs are made again sooner than anything is read
        return self._assets.make_room(needed_bytes, in_use)

    def load(self, asset: Asset) -> Any:
        parked = self._find_parked(asset)
        if parked is not None:
            return self._reader.wake(asset, parked)
        match asset.kind:
            case "model":
                return self._reader.read_model(asset.name)
            case "controlnet":
                return self._reader.read_controlnet(asset.name)
            case "lora":
                assert asset.model is not None, "a LoRA is read against a model"
                modules = self._peek(asset.model).modules
                return self._reader.read_lora(asset.name, modules)

    def install(self, asset: Asset, loaded: Any) -> None:
        self._assets.add(asset, loaded)
        if self._host_cache is not None:
            self._host_cache.came_back(asset, self._reader.living_on_host(asset))
        match asset.kind:
            case "model":
                self._plan_warm_up(asset.name)
            case "controlnet":
                for model in self.loaded_models:
                    self._plan_warm_up(model)

    def unload(self, model: str) -> None:
        asset = Asset("model", model)
        if asset in self._assets:
            self._assets.drop(asset)
        if self._host_cache is not None:
            self._host_cache.drop(asset)

    def _find_parked(self, asset: Asset) -> Parked | None:
        return None if self._host_cache is None else self._host_cache.find(asset)

    def _park(self, asset: Asset, thing: Any) -> bool:
        return self._host_cache is not None and self._host_cache.park(asset, thing.at_rest())

    def _forget(self, asset: Asset, thing: Any) -> None:
        """Nothing else may keep what leaves memory alive."""
        if asset.model is not None:  # a LoRA
            self._peek(asset.model).forget(thing)
        elif asset.kind == "controlnet":  # it acts in programs
            self._clear_programs()

    def _peek(self, model: str) -> SdxlModel:
        found: SdxlModel = self._assets.peek(Asset("model", model))
        return found

    def _use(self, model: str) -> SdxlModel:
        found: SdxlModel = self._assets.use(Asset("model", model))
        return found

    # ---- requests ---------------------------------------------------------------------------

    def admit(self, request: GenerationRequest, accepted_s: float) -> RequestState:
        model = self._use(request.model)
        chunks = model.token_chunks(request)
        key = BatchKey(request.model, request.adapters, request.width, request.height, chunks)
        return RequestState(
            request=request,
            key=key,
            timer=PhaseTimer(accepted_s),
            scheduler=model.scheduler(request),
            generator=torch.Generator("cpu"),
        )

    @torch.inference_mode()
    def prepare(self, state: RequestState) -> None:
        request = state.request
        for asset in request.assets:
            self._assets.use(asset)
        model = self._use(request.model)
        # what keeps the device busy first, what the host has to compute last
        features = self._control_features(request)
        chunks = state.key.token_chunks
        state.conditioning = model.condition(request, self._adapters(state), chunks, features)
        state.generator.manual_seed(request.seed)
        state.latents = model.noise(state)

    def _control_features(self, request: GenerationRequest) -> torch.Tensor | None:
        if request.control is None:
            return None
        depth, size = request.control.depth, (request.height, request.width)
        image = depth_to_control(depth, *size, self._device, self._precision.dtype)
        controlnet: ControlNetwork = self._assets.peek(
            Asset("controlnet", request.control.controlnet)
        )
        return controlnet.features(image)

    def _adapters(self, state: RequestState) -> list[tuple[LoraFactors, float]]:
        key = state.key
        return [
            (self._assets.peek(Asset("lora", adapter.name, key.model)), adapter.weight)
            for adapter in key.adapters
        ]

    @torch.inference_mode()
    def predict(self, states: Sequence[RequestState]) -> list[torch.Tensor]:
        model = self._use(states[0].key.model)
        controlnets = {
            name: self._assets.peek(Asset("controlnet", name))
            for name in self._assets.names("controlnet")
        }
        predictions = model.predict(states, self._adapters(states[0]), controlnets)
        self._pace.step_launched()
        return predictions

    @torch.inference_mode()
    def advance(self, state: RequestState, prediction: torch.Tensor) -> None:
        denoise.advance(state, prediction)

    @torch.inference_mode()
    def decode(self, state: RequestState) -> Frame:
        assert state.latents is not None, "decode() comes after the last step"
        return self._use(state.request.model).decode(state.latents, state.tiled)

    # ---- in the pauses, and when memory runs out --------------------------------------------

    def warm_up(self) -> bool:
        return self._warm_ups.do_one_piece()

    def _plan_warm_up(self, model: str) -> None:
        if self._device.type == "cuda":  # elsewhere nothing is compiled or recorded
            latest = next(reversed(self._assets.names("controlnet")), None)
            self._warm_ups.plan(model, latest)

    def release_memory(self) -> None:
        self._clear_programs()
        self._memory.release()

    def _clear_programs(self) -> None:
        for model in self.loaded_models:
            self._peek(model).clear_programs()
        self._recorder.renew_pool()

    def relieve(self, state: RequestState, stage: Stage, in_use: Collection[Asset]) -> str | None:
        model = self._peek(state.request.model)
        note: str | None = None
        if "memory_released" not in state.notes:
            self._assets.drop_idle(in_use)
            note = "memory_released"
        elif stage == "decode" and self._tiling_helps(state):
            state.tiled = True
            note = "vae_tiled"
        elif not model.parked:
            if self._host_cache is not None:
                self._host_cache.make_room(PARKED.host_bytes)
            model.park()
            note = "offloaded"
        if note is not None:
            self.release_memory()
        return note

    def _tiling_helps(self, state: RequestState) -> bool:
        request = state.request
        large = needs_tiles(request.height // 8, request.width // 8)
        return large and not state.tiled and not self._tier.tiles
