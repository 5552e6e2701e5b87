"""The runner that makes SDXL images: owns the device, the modules on it and all tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel

from experimance_controlnet.catalog.specs import Catalog, ModelSpec, Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine import denoise, vae
from experimance_controlnet.engine.checkpoint import SdxlModules, load_checkpoint, load_controlnet
from experimance_controlnet.engine.conditioning import PromptEncoder, depth_to_control
from experimance_controlnet.engine.lora import COMPONENTS, LoraFactors, load_lora
from experimance_controlnet.engine.merger import AdapterMerger
from experimance_controlnet.engine.request import (
    Adapter,
    Asset,
    BatchKey,
    Conditioning,
    GenerationRequest,
    PhaseTimer,
    PixelImage,
    RequestState,
)
from experimance_controlnet.engine.residency import (
    ACTIVATION_BYTES,
    ResidentModels,
    free_memory_bytes,
)
from experimance_controlnet.engine.runner import GpuMemory
from experimance_controlnet.engine.schedulers import make_scheduler, scheduler_config
from experimance_controlnet.errors import ModelFileError, SettingsError


@dataclass(slots=True)
class LoadedModel:
    """A checkpoint on the device and what belongs to it."""

    spec: ModelSpec
    modules: SdxlModules
    prompts: PromptEncoder
    mergers: dict[str, AdapterMerger]
    adapters: dict[str, LoraFactors] = field(default_factory=dict)
    """Read against these modules, by name."""


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

    def __init__(self, catalog: Catalog, store: ModelStore, device: str = "auto") -> None:
        """The store holds the files already: fetching them is not the runner's job.

        Raises:
            SettingsError: there is no such device.
        """
        self._catalog = catalog
        self._store = store
        self._device = choose_device(device)
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        self._models: ResidentModels[LoadedModel] = ResidentModels(
            free_bytes=lambda: free_memory_bytes(self._device), release=self.release_memory
        )
        self._controlnets: dict[str, ControlNetModel] = {}

    @property
    def device_name(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return "cpu"

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
                return load_controlnet(path, self._device, self._dtype)
            case "lora":
                modules = self._models.peek(asset.model).modules
                return load_lora(asset.name, path, modules, self._device)

    def _load_model(self, spec: ModelSpec, path: Path) -> LoadedModel:
        base = self._file(spec.base_source) if spec.base_source else None
        modules = load_checkpoint(path, base, self._device, self._dtype)
        return LoadedModel(
            spec=spec,
            modules=modules,
            prompts=PromptEncoder(modules, self._device),
            mergers={name: AdapterMerger(name, getattr(modules, name)) for name in COMPONENTS},
        )

    def install(self, asset: Asset, loaded: Any) -> None:
        match asset.kind:
            case "model":
                self._models.add(asset.name, loaded)
            case "controlnet":
                self._controlnets[asset.name] = loaded
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
        _, chunks = model.prompts.count_tokens(request.prompt)
        if request.negative_prompt is not None and request.rows == 2:
            chunks = max(chunks, model.prompts.count_tokens(request.negative_prompt)[1])
        scheduler = make_scheduler(
            request.scheduler,
            scheduler_config(model.spec, request.scheduler),
            request.steps,
            request.use_karras_sigmas,
        )
        key = BatchKey(request.model, request.adapters, request.width, request.height, chunks)
        return RequestState(
            request=request,
            key=key,
            timer=PhaseTimer(accepted_s),
            scheduler=scheduler,
            generator=torch.Generator("cpu").manual_seed(request.seed),
        )

    @torch.inference_mode()
    def prepare(self, state: RequestState) -> None:
        request = state.request
        model = self._models.use(request.model)
        # drawn on the CPU: a seed gives the same noise on every device and in every batch
        noise = torch.randn(
            (1, model.modules.unet.config["in_channels"], request.height // 8, request.width // 8),
            generator=state.generator,
            dtype=torch.float32,
        )
        state.latents = (noise * state.scheduler.init_noise_sigma).to(self._device)
        state.conditioning = self._condition(model, state)

    def _condition(self, model: LoadedModel, state: RequestState) -> Conditioning:
        request, chunks = state.request, state.key.token_chunks
        adapters = self._merge(model, request.adapters, ("text_encoder", "text_encoder_2"))
        weights_key = tuple((a.name, w) for a, w in adapters if a.touches_text())
        positive = model.prompts.encode(request.prompt, chunks, weights_key)
        prompts = [positive]
        if request.rows == 2 and request.negative_prompt is not None:
            prompts.insert(0, model.prompts.encode(request.negative_prompt, chunks, weights_key))
        embeds = torch.cat([prompt.embeds for prompt in prompts])
        pooled = torch.cat([prompt.pooled for prompt in prompts])
        if request.rows == 2 and request.negative_prompt is None:
            # SDXL was trained with zeros, not with the encoding of "", as the absent prompt
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
            pooled = torch.cat([torch.zeros_like(pooled), pooled])
        # original size, crop corner and target size: the picture is whole and of this size
        size = (request.height, request.width)
        time_ids = torch.tensor([[*size, 0, 0, *size]] * request.rows, dtype=self._dtype)
        return Conditioning(
            prompt_embeds=embeds.to(self._dtype),
            pooled_embeds=pooled.to(self._dtype),
            time_ids=time_ids.to(self._device),
            control_image=self._control_image(request),
            prompt_tokens=model.prompts.count_tokens(request.prompt)[0],
            negative_prompt_tokens=model.prompts.count_tokens(request.negative_prompt or "")[0],
        )

    def _control_image(self, request: GenerationRequest) -> torch.Tensor | None:
        if request.control is None:
            return None
        depth, size = request.control.depth, (request.height, request.width)
        return depth_to_control(depth, *size, self._device, self._dtype)

    def _merge(
        self, model: LoadedModel, adapters: Sequence[Adapter], components: Sequence[str]
    ) -> list[tuple[LoraFactors, float]]:
        """Make these adapters the ones merged into these components."""
        factors = [(model.adapters[adapter.name], adapter.weight) for adapter in adapters]
        for component in components:
            model.mergers[component].apply(factors)
        return factors

    @torch.inference_mode()
    def predict(self, states: Sequence[RequestState]) -> list[torch.Tensor]:
        key = states[0].key
        model = self._models.use(key.model)
        self._merge(model, key.adapters, ("unet",))
        return denoise.predict_noise(model.modules.unet, self._controlnets, states)

    @torch.inference_mode()
    def advance(self, state: RequestState, prediction: torch.Tensor) -> None:
        denoise.advance(state, prediction)

    @torch.inference_mode()
    def decode(self, state: RequestState) -> PixelImage:
        assert state.latents is not None, "decode() comes after the last step"
        model = self._models.use(state.request.model)
        pixels, notes = vae.decode(model.modules.vae, state.latents)
        state.notes += notes
        return pixels

    def release_memory(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
