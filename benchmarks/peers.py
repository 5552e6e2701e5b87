"""The peers: diffusers' own SDXL ControlNet pipeline on the same files, at its best settings.

Half precision on a GPU. The VAE is told that it need not be upcast, as its users do with the VAE
that was retrained for fp16: SDXL's own would decode in fp32, at several times the cost. On a CPU
everything is fp32.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import (
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from benchmarks.full_size import FamilyFiles
from benchmarks.standard_request import FIRST_ERA, standard_request
from benchmarks.timing import Repeats, median_ms, progress
from experimance_controlnet.engine.request import Adapter, GenerationRequest

Result = dict[str, Any]

BATCH = 4
"""Prompts in one call, for the peer's throughput: our requests of one batch of rows."""


class Peer:
    """One pipeline on the device; adapters are live PEFT layers."""

    def __init__(self, files: FamilyFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.files, self.device, self.dtype = files, device, dtype
        controlnet = ControlNetModel.from_pretrained(files.controlnet, dtype=dtype)
        self.pipeline: Any = StableDiffusionXLControlNetPipeline.from_pretrained(
            files.base, controlnet=controlnet, dtype=dtype, add_watermarker=False
        )
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.register_to_config(force_upcast=False)

    def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Load what is missing and make exactly these the active ones."""
        known = {name for names in self.pipeline.get_list_adapters().values() for name in names}
        for adapter in adapters:
            if adapter.name not in known:
                file = self.files.lora(adapter.name)
                with warnings.catch_warnings():  # peft warns of a second adapter, which is meant
                    warnings.simplefilter("ignore", UserWarning)
                    self.pipeline.load_lora_weights(
                        file.parent, weight_name=file.name, adapter_name=adapter.name
                    )
        if adapters:
            self.pipeline.set_adapters(
                [adapter.name for adapter in adapters], [adapter.weight for adapter in adapters]
            )
        elif known:
            self.pipeline.unload_lora_weights()

    def arguments(self, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
        """What the pipeline's call takes for these, which share everything but prompt and seed."""
        first = requests[0]
        assert first.control is not None
        depth = torch.from_numpy(first.control.depth)[None, None]
        return {
            "prompt": [request.prompt for request in requests],
            "negative_prompt": [request.negative_prompt for request in requests],
            "image": depth.expand(len(requests), 3, -1, -1),
            "controlnet_conditioning_scale": first.control.strength,
            "num_inference_steps": first.steps,
            "guidance_scale": first.cfg,
            "generator": [torch.Generator("cpu").manual_seed(each.seed) for each in requests],
            "width": first.width,
            "height": first.height,
        }

    def latents(self, requests: Sequence[GenerationRequest]) -> torch.Tensor:
        """Without the VAE."""
        latents: torch.Tensor = self.pipeline(
            **self.arguments(requests), output_type="latent"
        ).images
        return latents

    def images(
        self, requests: Sequence[GenerationRequest], noise: torch.Tensor | None = None
    ) -> list[Image.Image]:
        """Whole pictures. ``noise``: (n, 4, H/8, W/8) of unit variance, in place of the seeds'."""
        arguments = self.arguments(requests)
        if noise is not None:
            arguments["latents"] = noise.to(self.dtype)
        images: list[Image.Image] = self.pipeline(**arguments, output_type="pil").images
        return images

    @torch.no_grad()  # as in the pipeline: in inference mode a compiled VAE would compile again
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE alone: (n, 3, H, W) on the device."""
        vae = self.pipeline.vae
        frame: torch.Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return frame

    def compile(self) -> None:
        """torch.compile in its default mode, channels_last: what its users take for SDXL."""
        pipeline = self.pipeline
        for module in (pipeline.unet, pipeline.controlnet, pipeline.vae):
            module.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.controlnet = torch.compile(pipeline.controlnet)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)


def measure_eager(
    files: FamilyFiles, device: torch.device, dtype: torch.dtype, repeats: Repeats
) -> Result:
    """Without adapters, then with an era's two as live PEFT layers."""
    peer = Peer(files, device, dtype)
    progress("peers: eager")
    eager = _measure(peer, repeats, None)
    batch_ms = median_ms(
        lambda number: peer.images(
            [standard_request(files.family, BATCH * number + i, None) for i in range(BATCH)]
        ),
        Repeats(1, max(1, repeats.measured // 2)),
        device,
    )
    eager[f"throughput_batch_{BATCH}_ips"] = round(1000 * BATCH / batch_ms, 3)
    progress("peers: live PEFT adapters")
    peer.set_adapters(standard_request(files.family, 0, FIRST_ERA).adapters)
    adapters = _measure(peer, repeats, FIRST_ERA)
    return {"eager": eager, "peft_adapters": adapters}


def measure_compiled(
    files: FamilyFiles, device: torch.device, dtype: torch.dtype, repeats: Repeats
) -> Result:
    """Without adapters: live ones compile to something else, merged ones to the same."""
    peer = Peer(files, device, dtype)
    peer.compile()
    progress("compile: the first picture, which compiles")
    started_s = time.perf_counter()
    peer.images([standard_request(files.family, 0, None)])
    compile_s = round(time.perf_counter() - started_s, 1)
    progress(f"compile: {compile_s} s")
    compiled = _measure(peer, repeats, None)
    return {"compile": compiled | {"compile_s": compile_s}}


def _measure(peer: Peer, repeats: Repeats, era: str | None) -> Result:
    family = peer.files.family

    def request(number: int) -> list[GenerationRequest]:
        return [standard_request(family, number, era)]

    latents = peer.latents(request(0))
    result = {
        "latency_ms": median_ms(lambda number: peer.images(request(number)), repeats, peer.device),
        "latents_ms": median_ms(lambda number: peer.latents(request(number)), repeats, peer.device),
        "vae_ms": median_ms(lambda number: peer.decode(latents), repeats, peer.device),
        "dtype": str(peer.dtype).removeprefix("torch."),
    }
    progress(f"peers: {result}")
    return result
