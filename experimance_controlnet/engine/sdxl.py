"""The runner that makes SDXL images: owns the device, the modules on it and all tensors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from experimance_controlnet.catalog.specs import Catalog, ModelSpec, Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine import denoise
from experimance_controlnet.engine.checkpoint import SdxlModules, load_checkpoint, load_controlnet
from experimance_controlnet.engine.conditioning import PromptEncoder, depth_to_control
from experimance_controlnet.engine.denoise import StepProgram, StepShape, shape_of
from experimance_controlnet.engine.graphs import ProgramCache, Recorder
from experimance_controlnet.engine.lora import COMPONENTS, LoraFactors, load_lora
from experimance_controlnet.engine.merger import AdapterMerger
from experimance_controlnet.engine.network.decoder import VaeDecoder
from experimance_controlnet.engine.network.unet import ControlNetwork, UnetNetwork
from experimance_controlnet.engine.request import (
    Adapter,
    Asset,
    BatchKey,
    Conditioning,
    Control,
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
from experimance_controlnet.engine.schedulers import make_scheduler, scheduler_config
from experimance_controlnet.engine.vae import Frame, ImageDecoder
from experimance_controlnet.errors import ModelFileError, SettingsError

log = structlog.get_logger()

_STEP_SHAPES = 24
"""Shapes of a step for which a model keeps a program: 8 numbers of rows at three sizes."""


@dataclass(slots=True)
class LoadedModel:
    """A checkpoint on the device and what belongs to it."""

    spec: ModelSpec
    modules: SdxlModules
    unet: UnetNetwork
    decoder: ImageDecoder
    prompts: PromptEncoder
    mergers: dict[str, AdapterMerger]
    adapters: dict[str, LoraFactors] = field(default_factory=dict)
    """Read against these modules, by name."""
    programs: ProgramCache[StepShape, StepProgram] = field(
        default_factory=lambda: ProgramCache(_STEP_SHAPES)
    )


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
        self._controlnets: dict[str, ControlNetwork] = {}
        self._recorder = Recorder(self._device)
        self._pace = _Pace(self._device)
        self._warm_ups: deque[tuple[str, Iterator[str]]] = deque()

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
                return ControlNetwork(load_controlnet(path, self._device, self._dtype))
            case "lora":
                modules = self._models.peek(asset.model).modules
                return load_lora(asset.name, path, modules, self._device)

    def _load_model(self, spec: ModelSpec, path: Path) -> LoadedModel:
        base = self._file(spec.base_source) if spec.base_source else None
        modules = load_checkpoint(path, base, self._device, self._dtype)
        return LoadedModel(
            spec=spec,
            modules=modules,
            unet=UnetNetwork(modules.unet),
            decoder=ImageDecoder(modules.vae, VaeDecoder(modules.vae), self._recorder),
            prompts=PromptEncoder(modules, self._device, self._recorder),
            mergers={name: AdapterMerger(name, getattr(modules, name)) for name in COMPONENTS},
        )

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
            (1, model.unet.latent_channels, request.height // 8, request.width // 8),
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
            control_features=self._control_features(request),
            prompt_tokens=model.prompts.count_tokens(request.prompt)[0],
            negative_prompt_tokens=model.prompts.count_tokens(request.negative_prompt or "")[0],
        )

    def _control_features(self, request: GenerationRequest) -> torch.Tensor | None:
        if request.control is None:
            return None
        depth, size = request.control.depth, (request.height, request.width)
        image = depth_to_control(depth, *size, self._device, self._dtype)
        return self._controlnets[request.control.controlnet].features(image)

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
        shape = shape_of(states)
        program = model.programs.get(shape, lambda: self._program(model, shape))
        predictions = program(states)
        self._pace.step_launched()
        return predictions

    def _program(self, model: LoadedModel, shape: StepShape) -> StepProgram:
        controls = {name: self._controlnets[name] for name in shape.controlnets}
        return StepProgram(shape, model.unet, controls, self._recorder)

    @torch.inference_mode()
    def advance(self, state: RequestState, prediction: torch.Tensor) -> None:
        denoise.advance(state, prediction)

    @torch.inference_mode()
    def decode(self, state: RequestState) -> Frame:
        assert state.latents is not None, "decode() comes after the last step"
        model = self._models.use(state.request.model)
        return model.decoder.decode(state.latents)

    def warm_up(self) -> bool:
        while self._warm_ups:
            name, pieces = self._warm_ups[0]
            if name in self._models.names and next(pieces, None) is not None:
                return True
            self._warm_ups.popleft()
        return False

    def _plan_warm_up(self, model: str) -> None:
        if self._device.type == "cuda":  # elsewhere nothing is compiled or recorded
            self._warm_ups.append((model, self._warm_up_pieces(model)))

    def _warm_up_pieces(self, model: str) -> Iterator[str]:
        """Make the standard request three times: compile, record, replay. A piece at a time."""
        started_s = time.monotonic()
        for seed in range(3):
            state = self.admit(self._standard_request(model, seed), accepted_s=0.0)
            self.prepare(state)
            yield "prepared"
            [prediction] = self.predict([state])
            self.advance(state, prediction)
            yield "stepped"
            self.decode(state).discard()
            yield "decoded"
        seconds = round(time.monotonic() - started_s, 3)
        log.info("model_warmed_up", model=model, seconds=seconds)

    def _standard_request(self, model: str, seed: int) -> GenerationRequest:
        """What most clients ask for, with a ControlNet where one is in memory."""
        flat = np.zeros((8, 8), dtype=np.float32)
        name = next(iter(self._controlnets), None)
        control = None if name is None else Control(name, flat, strength=1.0)
        return GenerationRequest(
            request_id="warm-up",
            model=model,
            prompt=f"warm-up {seed}",
            negative_prompt=None,
            width=1024,
            height=1024,
            steps=2,
            cfg=2.0,
            seed=seed,
            scheduler="euler",
            control=control,
        )

    def release_memory(self) -> None:
        # Programs are made again when they are needed.
        for name in self._models.names:
            model = self._models.peek(name)
            model.programs.clear()
            model.decoder.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
