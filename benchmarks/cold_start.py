"""How long until the first image: from the start of the process, weights in the page cache.

A checkpoint of SDXL's size (7 GB in fp16, weights from a seed) is written as one file in the
original layout, and a small ControlNet beside it. Then a server starts on them, and a client asks.

    python -m benchmarks.cold_start [--channels 320] [--folder DIR]

Fewer channels make a smaller UNet, for machines without a GPU: with 64 the file has 2 GB.
``--folder`` keeps the files for the next run. A model that was downloaded is ready a little sooner
than this one: its sha256 is known. Linux only: the server's memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from experimance_controlnet import __version__
from experimance_controlnet.server.listener import open_socket, url_of

EMBEDDED = Path(__file__).parents[1] / "experimance_controlnet" / "catalog" / "embedded"
REQUEST = {"prompt": "a river from above", "mock_depth": True, "steps": 6, "cfg": 1.0}
CATALOGUE = """
[models.lightning]
source = {uri = "model.safetensors"}
base_source = {uri = "base"}
steps = 6
cfg = 1.0
scheduler = "euler"

[controlnets.sdxl_small]
source = {uri = "controlnet"}
"""
DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds since the start of the process, unless it says otherwise."""

    first_ping_s: float
    slowest_ping_s: float
    """How long the slowest of the later ones took to answer, until the model was there."""
    ready_s: float
    first_image_s: float
    second_image_took_s: float
    """From request to answer: the part of the first that does not come again."""
    anonymous_mb: float
    """The most memory of the server that is no file's page."""
    read: list[dict[str, Any]]
    """What the server logs of each set of weights."""


# --- the files ------------------------------------------------------------------------------


def sdxl_configs(channels: int) -> Mapping[str, Mapping[str, Any]]:
    """What makes the embedded model SDXL's size, at 320 channels."""
    unet = {
        "block_out_channels": [channels, 2 * channels, 4 * channels],
        "attention_head_dim": [channels // 64, channels // 32, channels // 16],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "norm_num_groups": 32,
    }
    clip = {"vocab_size": 49408}
    return {
        "base/unet": unet,
        "base/vae": {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}
        | {"down_block_types": ["DownEncoderBlock2D"] * 4}
        | {"up_block_types": ["UpDecoderBlock2D"] * 4},
        "base/text_encoder": clip
        | {"hidden_size": 768, "intermediate_size": 3072}
        | {"num_hidden_layers": 12, "num_attention_heads": 12},
        "base/text_encoder_2": clip
        | {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
        | {"num_hidden_layers": 32, "num_attention_heads": 20},
        "controlnet": unet | {"conditioning_embedding_out_channels": [16, 32, 96, 256]},
    }


def make_files(folder: Path, channels: int) -> None:
    """Write the model, its ControlNet and their catalogue."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from tools.embedded_model.single_file import save_single_file

    classes: Mapping[str, Any] = {
        "base/unet": UNet2DConditionModel,
        "base/vae": AutoencoderKL,
        "base/text_encoder": CLIPTextModel,
        "base/text_encoder_2": CLIPTextModelWithProjection,
        "controlnet": ControlNetModel,
    }
    for part in EMBEDDED.glob("base/*/*.*"):
        if part.suffix in (".json", ".txt"):
            copy = folder / part.relative_to(EMBEDDED)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(part.read_bytes())
    for name, changes in sdxl_configs(channels).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        config = json.loads((EMBEDDED / name / "config.json").read_text("utf-8")) | changes
        (folder / name / "config.json").write_text(json.dumps(config))
        stem = "model" if "text_encoder" in name else "diffusion_pytorch_model"
        fill_file(classes[name], folder / name, stem)
    save_single_file(folder / "base", folder / "model.safetensors")
    for file in (folder / "base").rglob("*.safetensors"):
        file.unlink()
    (folder / "catalogue.toml").write_text(CATALOGUE)


def fill_file(component: Any, folder: Path, stem: str) -> None:
    """Weights from a seed, in fp16: small numbers, norms that leave their input as it is."""
    import torch
    from safetensors.torch import save_file

    from experimance_controlnet.engine.weights import build_empty

    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=torch.float16)
        if tensor.ndim > 1:
            return tensor.normal_(0, 0.02, generator=generator)
        return tensor.fill_(1.0 if name.endswith("weight") else 0.0)

    empty = build_empty(component, folder).state_dict()
    tensors = {name: draw(name, tensor.shape) for name, tensor in empty.items()}
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


# --- the start ------------------------------------------------------------------------------


@contextmanager
def server(folder: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process over the files; killed on the way out."""
    environment = os.environ | {
        "MODEL_SERVER_HOST": "127.0.0.1",
        "MODEL_SERVER_PORT": url.rpartition(":")[2],
        "MODEL_CATALOG": str(folder / "catalogue.toml"),
        "MODELS_DIR": str(folder / "models"),
        "MODEL_LOG": str(folder / "server.log"),
        "PRELOAD_MODEL": "lightning",
    }
    (folder / "server.log").unlink(missing_ok=True)
    command = [sys.executable, "-m", "experimance_controlnet.model_server"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def measure(folder: Path, size: int) -> Result:
    """Start a server and wait for its first images."""
    with open_socket("127.0.0.1", 0) as free:
        url = url_of(free)
    started_s = time.monotonic()
    slowest_ping_s = 0.0
    body = REQUEST | {"width": size, "height": size}
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as client, server(folder, url) as process:
        wait(process, lambda: answers(client), started_s)
        first_ping_s = time.monotonic() - started_s

        def ready() -> bool:
            nonlocal slowest_ping_s
            asked_s = time.monotonic()
            client.get("/ping").raise_for_status()
            slowest_ping_s = max(slowest_ping_s, time.monotonic() - asked_s)
            health = client.get("/checkhealth").json()
            if health["status"] == "error":
                raise SystemExit(f"the server has failed: {health['last_error']}")
            return bool(health["status"] == "ready")

        peak_bytes = wait(process, ready, started_s)
        ready_s = time.monotonic() - started_s
        client.post("/generate", json=body).raise_for_status()
        first_image_s = time.monotonic() - started_s
        asked_s = time.monotonic()
        client.post("/generate", json=body).raise_for_status()
        took_s = time.monotonic() - asked_s
    events = [json.loads(line) for line in (folder / "server.log").read_text().splitlines()]
    fields = ("source", "weights_bytes", "seconds", "bytes_per_s")
    return Result(
        first_ping_s=round(first_ping_s, 2),
        slowest_ping_s=round(slowest_ping_s, 2),
        ready_s=round(ready_s, 2),
        first_image_s=round(first_image_s, 2),
        second_image_took_s=round(took_s, 2),
        anonymous_mb=round(peak_bytes / 1e6),
        read=[
            {field: event[field] for field in fields}
            for event in events
            if event["event"] == "weights_read"
        ],
    )


def answers(client: httpx.Client) -> bool:
    """Whether the port is open."""
    try:
        return client.get("/ping").is_success
    except httpx.TransportError:
        return False


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool], started_s: float) -> int:
    """Until it holds; returns the most anonymous memory of the process meanwhile, bytes."""
    peak_bytes = 0
    while not condition():
        if process.poll() is not None or time.monotonic() - started_s > DEADLINE_S:
            raise SystemExit("the server does not start; see server.log of --folder")
        peak_bytes = max(peak_bytes, anonymous_bytes(process.pid))
        time.sleep(0.02)
    return peak_bytes


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's page."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say how much memory is anonymous")


def main() -> None:
    """Make the files where they are not there yet, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=int, default=320, help="a multiple of 64 (default 320)")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side (default 1024)")
    parser.add_argument("--folder", type=Path, help="keep the files here (default: do not)")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="cold_start_") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        if not (folder / "catalogue.toml").exists():
            make_files(folder, options.channels)
        result = measure(folder, options.size)
    facts = {"version": __version__, "channels": options.channels, "size_px": options.size}
    print(json.dumps({"benchmark": "cold_start", **facts, **asdict(result)}))


if __name__ == "__main__":
    main()
