"""Adapters: merged exactly, unmerged exactly, refused when they do not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.checkpoint import SdxlModules, load_checkpoint
from experimance_controlnet.engine.lora import COMPONENTS, LoraFactors, load_lora
from experimance_controlnet.engine.merger import AdapterMerger
from experimance_controlnet.errors import BadAdapterError

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
RANK = 4
"""Of the embedded adapters."""


@pytest.fixture(scope="module")
def modules(catalog: Catalog, store: ModelStore) -> SdxlModules:
    folder = store.path(catalog.models["base"].source)
    assert folder is not None
    return load_checkpoint(folder, None, CPU, torch.float32)


@pytest.fixture
def lora_file(catalog: Catalog, store: ModelStore) -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = store.path(catalog.loras[name].source)
        assert path is not None
        return path

    return find


def weights(module: torch.nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in module.named_parameters()}


def changed(before: Tensors, module: torch.nn.Module) -> set[str]:
    return {
        name for name, tensor in module.named_parameters() if not torch.equal(before[name], tensor)
    }


def expected_delta(raw: Tensors, component: str, path: str) -> torch.Tensor | None:
    """``alpha / rank * up @ down`` from the file's own keys, in diffusers' or kohya's layout."""
    diffusers = f"{component}.{path}.lora_"
    if f"{diffusers}A.weight" in raw:
        return raw[f"{diffusers}B.weight"].float() @ raw[f"{diffusers}A.weight"].float()
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_text_model_",
        "text_encoder_2": "lora_te2_",
    }[component]
    kohya = prefix + path.replace(".", "_")
    if f"{kohya}.alpha" not in raw:
        return None
    up, down = (raw[f"{kohya}.lora_{part}.weight"].float().flatten(1) for part in ("up", "down"))
    return float(raw[f"{kohya}.alpha"]) / len(down) * up @ down


def mixed_alphas(tensors: Tensors) -> Tensors:
    """Another alpha for each layer."""
    alphas = [key for key in tensors if key.endswith(".alpha")]
    return tensors | {key: torch.tensor(0.5 + index % 7) for index, key in enumerate(alphas)}


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("experimance", dict),
        ("experimance", mixed_alphas),
        ("experimance_wilderness", dict),
        ("experimance_historical", dict),
        ("experimance_future", dict),
    ],
)
def test_merged_is_the_formula(
    modules: SdxlModules,
    lora_file: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    edit: Callable[[Tensors], Tensors],
) -> None:
    file = edited(lora_file(name), tmp_path / "lora.safetensors", edit)
    factors, raw = load_lora(name, file, modules, CPU), load_file(file)
    for component in COMPONENTS:
        module: torch.nn.Module = getattr(modules, component)
        before, merger = weights(module), AdapterMerger(component, module)
        merger.apply([(factors, 0.7)])
        touched = {f"{path}.weight" for path in factors.deltas[component]}
        assert changed(before, module) == touched
        for path in factors.deltas[component]:
            update = expected_delta(raw, component, path)
            assert update is not None, path
            expected = before[f"{path}.weight"] + 0.7 * update
            torch.testing.assert_close(module.get_parameter(f"{path}.weight").data, expected)
        merger.apply([])


def test_alpha_in_the_metadata_counts(modules: SdxlModules, tmp_path: Path) -> None:
    """As diffusers writes it: rank 4, alpha 1."""
    unet = copy.deepcopy(modules.unet)
    config = LoraConfig(r=4, lora_alpha=1, target_modules=["to_q"], init_lora_weights=False)
    unet.add_adapter(config)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    [file] = tmp_path.iterdir()
    deltas = load_lora("x", file, modules, CPU).deltas["unet"]
    assert deltas
    assert {delta.scale for delta in deltas.values()} == {0.25}


def with_metadata(source: Path, target: Path, **fields: object) -> Path:
    """The file with fields of peft's LoraConfig for the UNet."""
    metadata = json.dumps({f"unet.{name}": value for name, value in fields.items()})
    save_file(load_file(source), target, {"lora_adapter_metadata": metadata})
    return target


def test_metadata_scale_as_peft_does(
    modules: SdxlModules, lora_file: Callable[[str], Path], tmp_path: Path
) -> None:
    source = lora_file("experimance_wilderness")
    plain = load_lora("x", source, modules, CPU).deltas["unet"]
    assert {delta.scale for delta in plain.values()} == {1.0}
    first = next(iter(plain))
    fields = {"r": RANK, "lora_alpha": 2 * RANK, "alpha_pattern": {first: RANK / 2}}
    file = with_metadata(source, tmp_path / "patterns.safetensors", **fields)
    scales = {
        path: d.scale for path, d in load_lora("x", file, modules, CPU).deltas["unet"].items()
    }
    assert scales == {path: 0.5 if path == first else 2.0 for path in plain}
    file = with_metadata(source, tmp_path / "rs.safetensors", r=RANK, lora_alpha=6, use_rslora=True)
    stabilised = load_lora("x", file, modules, CPU).deltas["unet"]
    assert {delta.scale for delta in stabilised.values()} == {6 / RANK**0.5}


@pytest.mark.parametrize(
    "fields", [{"r": 2 * RANK}, {"r": RANK, "use_dora": True}, {"r": RANK, "unheard_of": 1}]
)
def test_metadata_that_cannot_be_followed_are_refused(
    modules: SdxlModules,
    lora_file: Callable[[str], Path],
    tmp_path: Path,
    fields: dict[str, object],
) -> None:
    file = with_metadata(lora_file("experimance_wilderness"), tmp_path / "x.safetensors", **fields)
    with pytest.raises(BadAdapterError, match="bad"):
        load_lora("bad", file, modules, CPU)


def test_any_order_of_switches_is_exact(
    modules: SdxlModules, lora_file: Callable[[str], Path]
) -> None:
    a, b, c = (
        load_lora(name, lora_file(name), modules, CPU)
        for name in ("drone", "experimance_historical", "experimance")
    )
    pristine = {name: weights(getattr(modules, name)) for name in COMPONENTS}
    mergers = {name: AdapterMerger(name, getattr(modules, name)) for name in COMPONENTS}

    def apply(*adapters: tuple[LoraFactors, float]) -> dict[str, Tensors]:
        for merger in mergers.values():
            merger.apply(adapters)
        return {name: weights(getattr(modules, name)) for name in COMPONENTS}

    first = apply((a, 0.8), (b, 0.4))
    for index in range(200):
        apply((a, 0.1 * (index % 7)), (c, 1.0)) if index % 2 else apply((b, 2.0))
    again = apply((a, 0.8), (b, 0.4))
    apply()
    for name in COMPONENTS:
        assert all(torch.equal(first[name][key], again[name][key]) for key in first[name])
        assert not changed(pristine[name], getattr(modules, name))


def test_storage_of_the_weights_never_moves(
    modules: SdxlModules, lora_file: Callable[[str], Path]
) -> None:
    factors = load_lora("drone", lora_file("drone"), modules, CPU)
    before = {name: tensor.data_ptr() for name, tensor in modules.unet.named_parameters()}
    merger = AdapterMerger("unet", modules.unet)
    merger.apply([(factors, 1.0)])
    merger.apply([])
    assert before == {name: tensor.data_ptr() for name, tensor in modules.unet.named_parameters()}


def test_the_same_adapters_again_cost_nothing(
    modules: SdxlModules, lora_file: Callable[[str], Path]
) -> None:
    factors = load_lora("drone", lora_file("drone"), modules, CPU)
    merger = AdapterMerger("unet", modules.unet)
    merger.apply([(factors, 1.0)])
    # counts the writes to a tensor
    versions = {name: tensor._version for name, tensor in modules.unet.named_parameters()}
    merger.apply([(factors, 1.0)])
    assert versions == {name: t._version for name, t in modules.unet.named_parameters()}
    merger.apply([(factors, 0.9)])
    assert versions != {name: t._version for name, t in modules.unet.named_parameters()}
    merger.apply([])


@pytest.mark.parametrize("at", [0, 3, -1])
def test_an_error_half_way_leaves_nothing_behind(
    modules: SdxlModules, lora_file: Callable[[str], Path], at: int
) -> None:
    good = load_lora("drone", lora_file("drone"), modules, CPU)
    path = sorted(good.deltas["unet"])[at]
    narrow = good.deltas["unet"][path]
    torn = type(narrow)(narrow.down[:, :-1], narrow.up, narrow.scale)
    bad = LoraFactors("bad", {**good.deltas, "unet": {**good.deltas["unet"], path: torn}})
    before = weights(modules.unet)
    merger = AdapterMerger("unet", modules.unet)
    for _ in range(2):
        with pytest.raises(ValueError, match="for a weight of"):
            merger.apply([(bad, 1.0)])
    merger.apply([(good, 1.0)])
    assert changed(before, modules.unet)
    merger.apply([])
    assert not changed(before, modules.unet)


def test_text_encoder_parts_are_read(
    modules: SdxlModules, lora_file: Callable[[str], Path]
) -> None:
    with_text = load_lora("experimance", lora_file("experimance"), modules, CPU)
    without = load_lora("drone", lora_file("drone"), modules, CPU)
    assert with_text.deltas["text_encoder"] and with_text.deltas["text_encoder_2"]
    assert with_text.touches_text() and not without.touches_text()


def edited(source: Path, target: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    save_file(edit(load_file(source)), target)
    return target


def other_width(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    return {**tensors, name: torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 1)}


def unknown_layer(tensors: Tensors) -> Tensors:
    extra = {
        f"unet.down_blocks.7.attentions.0.proj_in.lora_{part}.weight": torch.zeros(4, 4)
        for part in "AB"
    }
    return {**tensors, **extra}


def half_a_pair(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "edit",
    [
        other_width,
        unknown_layer,
        half_a_pair,
        lambda tensors: {"weight": torch.zeros(3)},
        lambda tensors: {**tensors, "unet.conv_in.dora_scale": torch.zeros(3)},
        lambda tensors: {**tensors, "unet.conv_in.diff": torch.zeros(3)},
        lambda tensors: {**tensors, "unet.conv_in.hada_w1_a": torch.zeros(3)},
    ],
    ids=["other_width", "unknown_layer", "half_a_pair", "no_lora", "dora", "diff", "loha"],
)
def test_a_lora_that_does_not_fit_is_refused(
    modules: SdxlModules,
    lora_file: Callable[[str], Path],
    tmp_path: Path,
    edit: Callable[[Tensors], Tensors],
) -> None:
    bad = edited(lora_file("experimance_wilderness"), tmp_path / "bad.safetensors", edit)
    with pytest.raises(BadAdapterError, match="bad"):
        load_lora("bad", bad, modules, CPU)


def test_a_pickle_is_refused(modules: SdxlModules, tmp_path: Path) -> None:
    file = tmp_path / "evil.safetensors"
    torch.save({"unet.conv_in.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(BadAdapterError):
        load_lora("evil", file, modules, CPU)
