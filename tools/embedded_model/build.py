"""Writes the embedded model family: ``python -m tools.embedded_model.build [--output DIR]``."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

from tools.embedded_model import architecture, initialise
from tools.embedded_model.adapters import RECIPES, Component, write_adapter
from tools.embedded_model.vocabulary import END, train_vocabulary, write_tokenizer

DEFAULT_OUTPUT = Path(__file__).parents[2] / "experimance_controlnet" / "catalog" / "embedded"
PADS = {"tokenizer": END, "tokenizer_2": "!"}  # as SDXL's two tokenizers pad

# One seed for each part, so that a change to one leaves the others as they are.
UNET_SEED, CONTROLNET_SEED, VAE_SEED, TEXT_SEED, TEXT_2_SEED = 1, 2, 3, 4, 5
# Siblings of the base UNet: folder, seed, and how far the weights stray from it.
SIBLINGS = (("lightning", 6, 0.15), ("hyper", 7, 0.25))


def build(output: Path) -> None:
    """Write every file of the family under ``output``, the weights in fp16."""
    unet, *encoders = _write_base(output / "base")
    for name, seed, amount in SIBLINGS:
        sibling = copy.deepcopy(unet)
        initialise.vary_weights(sibling, seed, amount)
        _save(sibling, output / name / "unet")
    controlnet = architecture.make_controlnet()
    initialise.initialise_controlnet(controlnet, CONTROLNET_SEED)
    _save(controlnet, output / "controlnet")
    models: dict[Component, nn.Module] = {"unet": unet}
    models |= {"text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    for recipe in RECIPES:
        write_adapter(output / "loras", recipe, models)
    # safetensors creates its files readable by their owner alone.
    for path in output.rglob("*.safetensors"):
        path.chmod(0o644)


def _write_base(folder: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The complete model. Returns its UNet (in fp32) and text encoders."""
    vocabulary = train_vocabulary()
    for name, pad in PADS.items():
        write_tokenizer(folder / name, vocabulary, pad)
    tokens, tokens_2 = (vocabulary.special_tokens(pad) for pad in PADS.values())
    unet, vae = architecture.make_unet(), architecture.make_vae()
    encoder = architecture.make_text_encoder(tokens)
    encoder_2 = architecture.make_text_encoder_2(tokens_2)
    initialise.initialise_unet(unet, UNET_SEED)
    initialise.initialise_vae(vae, VAE_SEED)
    initialise.initialise_text_encoder(encoder, TEXT_SEED)
    initialise.initialise_text_encoder(encoder_2, TEXT_2_SEED)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**architecture.SCHEDULER),
        add_watermarker=False,
    )
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        _save(pipeline.components[name], folder / name)
    _prefix_names(folder / "text_encoder" / "model.safetensors")
    return unet, encoder, encoder_2


def _save(model: Any, folder: Path) -> None:
    """Write config and weights of a diffusers or transformers model, which stays as it is."""
    copy.deepcopy(model).half().save_pretrained(folder)


def _prefix_names(path: Path) -> None:
    """Give the narrow encoder's weights the names that published SDXL repositories have.

    transformers reads both, but writes them without the prefix since it flattened the class.
    """
    tensors = {f"text_model.{name}": value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the embedded model family.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write to")
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
