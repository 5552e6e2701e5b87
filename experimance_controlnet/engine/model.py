"""One SDXL checkpoint on the device, and everything that a request asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from experimance_controlnet.catalog.specs import ModelSpec
from experimance_controlnet.engine.checkpoint import (
    CheckpointFrame,
    SdxlModules,
    checkpoint_tensors,
)
from experimance_controlnet.engine.conditioning import PromptEncoder
from experimance_controlnet.engine.denoise import StepProgram, StepShape, shape_of
from experimance_controlnet.engine.graphs import ProgramCache, Recorder
from experimance_controlnet.engine.lora import COMPONENTS, LoraFactors
from experimance_controlnet.engine.merger import AdapterMerger
from experimance_controlnet.engine.network.decoder import VaeDecoder
from experimance_controlnet.engine.network.unet import ControlNetwork, UnetNetwork
from experimance_controlnet.engine.precision import Precision
from experimance_controlnet.engine.request import Conditioning, GenerationRequest, RequestState
from experimance_controlnet.engine.resting import AtRest, Key
from experimance_controlnet.engine.schedulers import (
    NoiseScheduler,
    make_scheduler,
    scheduler_config,
)
from experimance_controlnet.engine.tiers import MemoryTier
from experimance_controlnet.engine.transfers import to_device
from experimance_controlnet.engine.vae import Frame, ImageDecoder

_STEP_SHAPES = 24
"""Shapes of a step for which a model keeps a program: 8 numbers of rows at three sizes."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

WeightedFactors = Sequence[tuple[LoraFactors, float]]
"""Adapters and their strengths."""


class SdxlModel:
    """Text encoders, UNet and VAE of one checkpoint.

    The engine's thread only; ``modules`` may also be read by the one that loads adapters.
    """

    def __init__(
        self,
        spec: ModelSpec,
        modules: SdxlModules,
        recorder: Recorder,
        precision: Precision,
        tier: MemoryTier,
    ) -> None:
        """Takes the modules over: their weights are laid out anew.

        Raises:
            BadWeightsError: they are not built as SDXL's are.
        """
        self.modules = modules
        self._spec = spec
        self._tier = tier
        self._recorder = recorder
        self._unet = UnetNetwork(modules.unet, precision.make_products())
        self._decoder = ImageDecoder(modules.vae, VaeDecoder(modules.vae), recorder)
        self._prompts = PromptEncoder(modules, self._unet.device, recorder)
        self._mergers = {name: AdapterMerger(name, getattr(modules, name)) for name in COMPONENTS}
        self._mergers["unet"].on_write(self._unet.weights_changed)
        self._programs: ProgramCache[StepShape, StepProgram] = ProgramCache(_STEP_SHAPES)
        self.parked = False
        """Text encoders and pristine copies are in the host's memory."""
        if tier.parks:
            self.park()

    def scheduler(self, request: GenerationRequest) -> NoiseScheduler:
        """A scheduler for this request alone: schedulers carry state."""
        return make_scheduler(
            request.scheduler,
            scheduler_config(self._spec, request.scheduler),
            request.steps,
            request.use_karras_sigmas,
        )

    def token_chunks(self, request: GenerationRequest) -> int:
        """Chunks of 77 tokens: the longer of prompt and negative prompt."""
        chunks = self._prompts.tokens(request.prompt).chunks
        if request.negative_prompt is not None and request.rows == 2:
            chunks = max(chunks, self._prompts.tokens(request.negative_prompt).chunks)
        return chunks

    def noise(self, state: RequestState) -> torch.Tensor:
        """The latents that the request begins with, (1, 4, H/8, W/8) fp32 on the device."""
        request = state.request
        size = (1, self._unet.latent_channels, request.height // 8, request.width // 8)
        # drawn on the CPU: a seed gives the same noise on every device and in every batch
        noise = torch.randn(size, generator=state.generator, dtype=torch.float32)
        latents: torch.Tensor = noise * state.scheduler.init_noise_sigma
        return to_device(latents, self._unet.device)

    def condition(
        self,
        request: GenerationRequest,
        adapters: WeightedFactors,
        chunks: int,
        control_features: torch.Tensor | None,
    ) -> Conditioning:
        """Encode the prompts, padded to ``chunks``, with these adapters merged."""
        self._merge(adapters, TEXT_ENCODERS)
        weights_key = tuple((a.name, w) for a, w in adapters if a.touches_text())
        prompts = [self._prompts.encode(request.prompt, chunks, weights_key)]
        if request.rows == 2 and request.negative_prompt is not None:
            negative = self._prompts.encode(request.negative_prompt, chunks, weights_key)
            prompts.insert(0, negative)
        embeds = torch.cat([prompt.embeds for prompt in prompts])
        pooled = torch.cat([prompt.pooled for prompt in prompts])
        if request.rows == 2 and request.negative_prompt is None:
            # SDXL was trained with zeros, not with the encoding of "", as the absent prompt
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
            pooled = torch.cat([torch.zeros_like(pooled), pooled])
        return Conditioning(
            prompt_embeds=embeds.to(self._unet.dtype),
            pooled_embeds=pooled.to(self._unet.dtype),
            control_features=control_features,
            prompt_tokens=self._prompts.tokens(request.prompt).count,
            negative_prompt_tokens=self._prompts.tokens(request.negative_prompt or "").count,
        )

    def predict(
        self,
        states: Sequence[RequestState],
        adapters: WeightedFactors,
        controlnets: Mapping[str, ControlNetwork],
    ) -> list[torch.Tensor]:
        """The guided noise of each request, (1, 4, H/8, W/8) fp32, with these adapters merged."""
        self._merge(adapters, ("unet",))
        shape = shape_of(states)
        program = self._programs.get(shape, lambda: self._program(shape, controlnets))
        return program(states)

    def decode(self, latents: torch.Tensor, tiled: bool) -> Frame:
        """Begin to make pixels of latents (1, 4, h, w) fp32; ``tiled`` where the tier is not."""
        return self._decoder.decode(latents, tiled=tiled or self._tier.tiles)

    def clear_programs(self) -> None:
        """Give up the programs; they are made again when they are needed."""
        self._programs.clear()
        self._decoder.clear()
        self._prompts.clear_programs()

    def park(self) -> None:
        """Move what can wait to the host's memory, for good: text encoders, pristine copies."""
        if not self.parked:
            self._prompts.park()
            for merger in self._mergers.values():
                merger.park()
            self.parked = True

    def at_rest(self) -> AtRest:
        """What the model is without adapters, whatever is merged; nothing is written."""
        on_device: dict[Key, torch.Tensor] = {}
        on_host: dict[Key, torch.Tensor] = {}
        pristine = {
            (component, name): weight
            for component, merger in self._mergers.items()
            for name, weight in merger.pristine_weights().items()
        }
        for key, live in checkpoint_tensors(self.modules).items():
            waits = self.parked and (key in pristine or key[0] in TEXT_ENCODERS)
            (on_host if waits else on_device)[key] = pristine.get(key, live)
        return AtRest(CheckpointFrame.of(self.modules), on_device, on_host)

    def forget(self, adapter: LoraFactors) -> None:
        """Give up all hold on an adapter that leaves memory."""
        for merger in self._mergers.values():
            merger.forget(adapter)

    def _program(self, shape: StepShape, controlnets: Mapping[str, ControlNetwork]) -> StepProgram:
        acting = {name: controlnets[name] for name in shape.controlnets}
        return StepProgram(shape, self._unet, acting, self._recorder)

    def _merge(self, adapters: WeightedFactors, components: Sequence[str]) -> None:
        """Make these adapters the ones merged into these components."""
        for component in components:
            self._mergers[component].apply(adapters)
