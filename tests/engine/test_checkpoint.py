"""Model files of every layout become the same modules; anything else is a typed error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.checkpoint import SdxlModules, load_checkpoint, load_controlnet
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
