"""Model files of every layout become the same modules; anything else is a typed error."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import load_file, save_file

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.checkpoint import (
    JOINED,
    SdxlModules,
    load_checkpoint,
    load_controlnet,
)
from experimance_controlnet.engine.network.unet import UnetNetwork
from experimance_controlnet.engine.weights import ByteCount, Placement, read_tensors
from experimance_controlnet.errors import BadWeightsError
from tools.embedded_model.single_file import save_single_file

CPU = torch.device("cpu")
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def base(catalog: Catalog, store: ModelStore) -> Path:
    path = store.path(catalog.models["base"].source)
    assert path is not None
    return path


@pytest.fixture(scope="module")
def single_file(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(base, path)
    return path


def load(source: Path, base: Path | None = None, dtype: torch.dtype = torch.float32) -> SdxlModules:
    return load_checkpoint(source, base, CPU, dtype)


def assert_equal(one: SdxlModules, other: SdxlModules) -> None:
    for name in COMPONENTS:
        expected = getattr(one, name).state_dict()
        found = getattr(other, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_original_layout_equals_diffusers_layout(base: Path, single_file: Path) -> None:
    keys = load_file(single_file).keys()
    assert "model.diffusion_model.input_blocks.0.0.weight" in keys
    assert_equal(load(base), load(single_file, base))


def test_a_load_is_counted_while_it_is_read(base: Path) -> None:
    unet, *rest = sorted(base.rglob("*.safetensors"), key=lambda file: "unet" not in str(file))
    sizes = [file.stat().st_size for file in (unet, *rest)]
    count = ByteCount(sum(sizes))
    assert count.share == 0
    read_tensors([unet], Placement(CPU, torch.float16, count=count))
    assert count.share == pytest.approx(sizes[0] / sum(sizes), abs=0.02)
    read_tensors(rest, Placement(CPU, torch.float16, count=count))
    assert 0.95 < count.share <= 1
    count.add(sum(sizes))  # the total is an estimate
    assert count.share == 1


def test_configs_alone_are_enough_beside_a_single_file(
    base: Path, single_file: Path, tmp_path: Path
) -> None:
    """As for real checkpoints: of the base repository only the small files are on disk."""
    configs = tmp_path / "configs"
    shutil.copytree(base, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    assert_equal(load(base), load(single_file, configs))


def test_a_folder_takes_what_it_lacks_from_its_base(
    catalog: Catalog, store: ModelStore, base: Path
) -> None:
    lightning = store.path(catalog.models["lightning"].source)
    assert lightning is not None and [part.name for part in lightning.iterdir()] == ["unet"]
    modules, plain = load(lightning, base), load(base)
    key = "conv_in.weight"
    assert not torch.equal(modules.unet.state_dict()[key], plain.unet.state_dict()[key])
    assert torch.equal(
        modules.text_encoder.state_dict()["final_layer_norm.weight"],
        plain.text_encoder.state_dict()["final_layer_norm.weight"],
    )


def test_fp16_variant_files(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(base, folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert_equal(load(base), load(folder))


def split(file: Path, index_name: str) -> None:
    """Replace a weight file by two shards and their index, as the libraries save big models."""
    tensors = load_file(file)
    names = sorted(tensors)
    halves = {"00001": names[::2], "00002": names[1::2]}
    weight_map: dict[str, str] = {}
    for number, half in halves.items():
        shard = file.with_name(f"{file.name.split('.')[0]}-{number}-of-00002.safetensors")
        save_file({name: tensors[name] for name in half}, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(half, shard.name)
    file.with_name(index_name).write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()


def test_sharded_files(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(base, folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    split(unet, "diffusion_pytorch_model.safetensors.index.json")
    split(folder / "text_encoder" / "model.safetensors", "model.safetensors.index.fp16.json")
    assert_equal(load(base), load(folder))
    next(unet.parent.glob("*-00002-of-*")).unlink()
    with pytest.raises(BadWeightsError):
        load(folder)


def test_attention_may_have_its_old_names(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(base, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for name in list(tensors):
        for now, before in old.items():
            if f".{now}." in name:
                tensors[name.replace(now, before)] = tensors.pop(name)
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    assert_equal(load(base), load(folder))


def test_useless_tensors_are_left_out(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(base, folder)
    for file in folder.rglob("*.safetensors"):
        extra = {"text_model.embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64)}
        save_file(load_file(file) | extra, file, {"format": "pt"})
    modules = load(folder)
    assert_equal(load(base), modules)
    for encoder in (modules.text_encoder, modules.text_encoder_2):
        [ids] = [buffer for name, buffer in encoder.named_buffers() if "position_ids" in name]
        assert torch.equal(ids, torch.arange(77)[None])


def test_every_convolution_is_channels_last(base: Path) -> None:
    modules = load(base)
    for name in COMPONENTS:
        for tensor in getattr(modules, name).parameters():
            assert tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("as_one_file", [False, True])
def test_a_load_leaves_other_threads_alone(
    base: Path, single_file: Path, as_one_file: bool
) -> None:
    """The engine's thread makes tensors while the loader's builds modules."""
    source = single_file if as_one_file else base
    loading = threading.Event()
    stray: list[torch.Tensor] = []

    def make_layers() -> None:
        while loading.is_set():
            weight = torch.nn.Linear(2, 2).weight
            if weight.is_meta or weight.dtype != torch.float32:
                stray.append(weight)

    loading.set()
    engine = threading.Thread(target=make_layers)
    engine.start()
    try:
        for _ in range(3):
            load(source, base, torch.float16)
    finally:
        loading.clear()
        engine.join()
    assert not stray


def anonymous_bytes() -> int:
    """Memory of this process that is no file's page."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_never_in_memory_twice(
    catalog: Catalog, store: ModelStore, tmp_path: Path
) -> None:
    source = store.path(catalog.controlnets["sdxl_small"].source)
    assert source is not None
    config = ControlNetModel.load_config(source)
    big = ControlNetModel.from_config({**config, "block_out_channels": [256, 512, 768]})
    big.save_pretrained(tmp_path)
    del big
    gc.collect()
    load_controlnet(source, CPU, torch.float16)  # what a first load allocates for good
    done, samples = threading.Event(), [before := anonymous_bytes()]

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    loaded = load_controlnet(tmp_path, CPU, torch.float16)
    done.set()
    sampler.join()
    samples.append(anonymous_bytes())
    weights_bytes = sum(tensor.nbytes for tensor in loaded.parameters())
    assert weights_bytes > 100e6 and len(samples) > 3
    assert max(samples) - before < 1.2 * weights_bytes


def test_half_precision_keeps_the_vae_in_range(base: Path) -> None:
    modules = load(base, dtype=torch.float16)
    assert modules.unet.dtype == torch.float16
    assert modules.vae.dtype == torch.bfloat16  # force_upcast: fp16 would overflow


def test_weights_need_no_gradients_and_are_in_evaluation_mode(base: Path) -> None:
    modules = load(base)
    for name in COMPONENTS:
        module: torch.nn.Module = getattr(modules, name)
        assert not module.training
        assert not any(tensor.requires_grad for tensor in module.parameters())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(file: Path) -> None:
    torch.save({"x": torch.zeros(1)}, file)


def without_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, file, {"format": "pt"})


def of_other_shape(file: Path) -> None:
    tensors = load_file(file)
    name = sorted(name for name in tensors if tensors[name].ndim == 2)[0]
    save_file({**tensors, name: torch.zeros(3, 3)}, file, {"format": "pt"})


@pytest.mark.parametrize("damage", [cut, pickled, without_a_tensor, of_other_shape])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_damaged_folder_is_refused(
    base: Path, tmp_path: Path, component: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    [file] = (folder / component).glob("*.safetensors")
    damage(file)
    with pytest.raises(BadWeightsError):
        load(folder)


@pytest.mark.parametrize("damage", [cut, pickled, without_a_tensor, of_other_shape])
def test_a_damaged_single_file_is_refused(
    base: Path, single_file: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(single_file, file)
    damage(file)
    with pytest.raises(BadWeightsError):
        load(file, base)


def test_missing_parts_are_named(base: Path, single_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(BadWeightsError, match="vae"):
        load(folder)
    with pytest.raises(BadWeightsError, match="base_source"):
        load(single_file)


def test_only_safetensors_are_read(base: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"x")
    with pytest.raises(BadWeightsError, match="safetensors"):
        load(checkpoint, base)
    folder = tmp_path / "folder"
    shutil.copytree(base, folder)
    [weights] = (folder / "unet").glob("*.safetensors")
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(BadWeightsError):
        load(folder)


def test_controlnet(catalog: Catalog, store: ModelStore, tmp_path: Path) -> None:
    source = store.path(catalog.controlnets["sdxl_small"].source)
    assert source is not None
    controlnet = load_controlnet(source, CPU, torch.float32)
    assert set(controlnet.config["down_block_types"]) == {"DownBlock2D"}
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    with pytest.raises(BadWeightsError):
        load_controlnet(broken, CPU, torch.float32)


def test_exactly_what_is_joined_waits_for_it(base: Path, single_file: Path) -> None:
    unet = load(base).unet
    UnetNetwork(unet)
    joined = {
        name
        for name, parameter in unet.named_parameters()
        if parameter.untyped_storage().nbytes() > parameter.nbytes
    }
    assert joined == {name for name in unet.state_dict() if JOINED.search(name)}
    original = [
        key
        for key in load_file(single_file)
        if key.startswith("model.diffusion_model.") and JOINED.search(key)
    ]
    assert len(original) == len(joined)
