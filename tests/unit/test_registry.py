"""Catalogue files: the two that are shipped, and everything an operator's own can get wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experimance_controlnet.catalog.location import LocalPlace, locate
from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.specs import AdapterUse, Catalog, Source
from experimance_controlnet.errors import CatalogError

MINIMAL = """
[models.tiny]
source = { uri = "weights/tiny.safetensors" }
base_source = { uri = "hf://owner/repo@v1", files = ["*.json"] }
steps = 4
cfg = 1
scheduler = "lcm"
scheduler_config = { beta_start = 0.1, steps_offset = 1, clip_sample = false }

[loras.moss]
source = { uri = "https://example.org/moss.safetensors", size_bytes = 8 }
[loras.moss.extra]
"""
GOOD = MINIMAL.replace("[loras.moss.extra]\n", "")


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def complaint(folder: Path, text: str) -> str:
    """The message for a bad catalogue: always one line, led by the file."""
    which = write(folder, text)
    with pytest.raises(CatalogError) as caught:
        load_catalog(which)
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"{which}: ")
    return caught.value.message.removeprefix(f"{which}: ")


# -- the catalogues that are shipped ----------------------------------------------------------


def uses(catalog: Catalog, era: str) -> tuple[dict[str, float], dict[str, float] | None]:
    def as_dict(adapters: tuple[AdapterUse, ...]) -> dict[str, float]:
        return {use.lora: use.weight for use in adapters}

    spec = catalog.eras[era]
    return as_dict(spec.adapters), as_dict(spec.alternative) if spec.alternative else None


@pytest.mark.parametrize("which", ["experimance", "embedded"])
@pytest.mark.parametrize(
    ("era", "adapters", "alternative"),
    [
        ("wilderness", {"experimance_wilderness": 1.0}, {"drone": 0.8, "experimance": 0.4}),
        ("pre_industrial", {"experimance_historical": 1.0}, {"drone": 0.8, "experimance": 0.4}),
        ("future", {"experimance_future": 1.0}, {"experimance": 1.1}),
        ("early_industrial", {"drone": 0.8, "experimance": 0.4}, None),
        ("late_industrial", {"drone": 0.6, "experimance": 0.5}, None),
        ("industrial", {"drone": 0.3, "experimance": 0.6}, None),
        ("modern", {"drone": 0.3, "experimance": 0.6}, None),
        ("current", {"drone": 0.3, "experimance": 0.9}, None),
        ("dystopia", {"drone": 0.6, "experimance": 0.5}, None),
        ("ruins", {"drone": 0.8, "experimance": 0.3}, None),
    ],
)
def test_eras_of_the_installation(
    which: str, era: str, adapters: dict[str, float], alternative: dict[str, float] | None
) -> None:
    assert uses(load_catalog(which), era) == (adapters, alternative)


@pytest.mark.parametrize("which", ["experimance", "embedded"])
def test_models_run_with_the_settings_they_were_made_for(which: str) -> None:
    models = load_catalog(which).models
    settings = {name: (m.steps, m.cfg, m.scheduler) for name, m in models.items()}
    assert settings == {
        "lightning": (6, 2.0, "euler"),
        "hyper": (8, 6.0, "euler"),
        "base": (20, 7.5, "dpm_sde"),
    }
    leading: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    assert models["lightning"].scheduler_config == models["hyper"].scheduler_config == leading
    assert models["base"].scheduler_config == leading | {
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "midpoint",
        "use_karras_sigmas": True,
    }


def test_files_of_the_real_models() -> None:
    catalog = load_catalog("experimance")
    bucket = "https://storage.googleapis.com/experimance_models/"
    single = [catalog.models["lightning"], catalog.models["hyper"]]
    assert [model.source.uri.removeprefix(bucket) for model in single] == [
        "juggernautXL_juggXILightningByRD.safetensors",
        "Juggernaut_X_RunDiffusion_Hyper.safetensors",
    ]
    for model in single:
        assert model.base_source is not None
        assert model.base_source.uri == "hf://stabilityai/stable-diffusion-xl-base-1.0"
        assert not [name for name in model.base_source.files if "safetensors" in name]
    base = catalog.models["base"].source
    assert base.uri == "hf://stabilityai/stable-diffusion-xl-base-1.0"
    assert len([name for name in base.files if name.endswith(".fp16.safetensors")]) == 4
    assert catalog.controlnets["sdxl_small"].source == Source(
        "hf://diffusers/controlnet-depth-sdxl-1.0-small",
        files=("config.json", "diffusion_pytorch_model.fp16.safetensors"),
    )
    loras = {
        name: (lora.source.uri.removeprefix(bucket), lora.weight)
        for name, lora in catalog.loras.items()
    }
    assert loras == {
        "drone": ("drone_photo_v1.0_XL.safetensors", 0.8),
        "experimance": (
            "civitai_experimance_sdxl_lora_step_1000_1024x1024.safetensors",
            1.0,
        ),
        "experimance_wilderness": ("experimance_wilderness.safetensors", 1.0),
        "experimance_historical": ("experimance_historical.safetensors", 1.0),
        "experimance_future": ("experimance_future.safetensors", 1.0),
    }


def test_the_embedded_catalogue_has_the_same_names_and_needs_no_network() -> None:
    real, embedded = load_catalog("experimance"), load_catalog("embedded")
    assert (real.name, embedded.name) == ("experimance", "embedded")
    for kind in ("models", "controlnets", "loras", "eras"):
        assert set(getattr(embedded, kind)) == set(getattr(real, kind))
    sources = {
        **{model.name: model.source.uri for model in embedded.models.values()},
        **{spec.name: spec.source.uri for spec in embedded.controlnets.values()},
    }
    assert sources == {
        "lightning": "package:lightning",
        "hyper": "package:hyper",
        "base": "package:base",
        "sdxl_small": "package:controlnet",
    }
    for name in ("lightning", "hyper"):
        assert embedded.models[name].base_source == Source("package:base")
    for lora in embedded.loras.values():
        assert lora.source.uri == f"package:loras/{lora.name}.safetensors"
        assert lora.weight == real.loras[lora.name].weight


def test_nothing_in_a_catalogue_can_be_changed() -> None:
    catalog = load_catalog("embedded")
    mappings: list[Any] = [
        catalog.models,
        catalog.controlnets,
        catalog.loras,
        catalog.eras,
        catalog.models["base"].scheduler_config,
    ]
    for mapping in mappings:
        with pytest.raises(TypeError):
            mapping["new"] = 1


# -- an operator's own ------------------------------------------------------------------------


def test_an_own_catalogue(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path, GOOD + "[eras.bog]\nadapters = { moss = -0.5 }\n"))
    assert catalog.name == "mine"
    model = catalog.models["tiny"]
    assert model.source == Source(str(tmp_path / "weights/tiny.safetensors"))
    assert model.base_source == Source("hf://owner/repo@v1", files=("*.json",))
    assert (model.steps, model.cfg, model.scheduler) == (4, 1.0, "lcm")
    assert model.scheduler_config == {
        "beta_start": 0.1,
        "steps_offset": 1,
        "clip_sample": False,
    }
    assert catalog.loras["moss"].weight == 1.0
    assert catalog.loras["moss"].source.size_bytes == 8
    assert catalog.eras["bog"].adapters == (AdapterUse("moss", -0.5),)
    assert not catalog.controlnets


def test_local_paths_follow_the_file_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path.parent)
    catalog = load_catalog(f"{tmp_path.name}/mine.toml")
    assert catalog.models["tiny"].source.uri == str(tmp_path / "weights/tiny.safetensors")


def test_hashes_are_read_in_either_case(tmp_path: Path) -> None:
    text = GOOD.replace("size_bytes = 8", f'sha256 = "{"AB" * 32}"')
    assert load_catalog(write(tmp_path, text)).loras["moss"].source.sha256 == "ab" * 32


def test_an_unknown_key_is_named_with_its_path(tmp_path: Path) -> None:
    known = "unknown key; known here: source, weight"
    assert complaint(tmp_path, MINIMAL) == f"loras.moss.extra: {known}"
    text = GOOD.replace("steps = 4", "step = 4")
    assert complaint(tmp_path, text) == "models.tiny.steps: is missing (and 1 more)"
    known = "unknown key; known here: extends, remove, models, controlnets, loras, eras"
    assert complaint(tmp_path, GOOD + "[lora.fern]\n") == f"lora: {known}"
    text = GOOD.replace("size_bytes = 8", "size = 8")
    known = "unknown key; known here: uri, sha256, size_bytes, files"
    assert complaint(tmp_path, text) == f"loras.moss.source.size: {known}"


def test_bad_toml_is_named_with_its_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, "[models.tiny]\nsteps = 4\ncfg = = 2\n")
    assert message.startswith("not TOML: ")
    assert "line 3" in message


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(CatalogError, match="not TOML: 'utf-8' codec"):
        load_catalog(str(path))


@pytest.mark.parametrize("which", ["experimence", "no/such.toml", "."])
def test_a_catalogue_that_cannot_be_read(which: str) -> None:
    with pytest.raises(CatalogError, match="a catalogue is experimance or embedded or a TOML file"):
        load_catalog(which)


def test_an_era_uses_only_loras_that_exist(tmp_path: Path) -> None:
    text = GOOD + "[eras.bog]\nadapters = { moss = 1.0, ferns = 1.0 }\n"
    todo = "there is no LoRA of this name; add [loras.ferns], or change or remove the era"
    assert complaint(tmp_path, text) == f"eras.bog.adapters.ferns: {todo}"
    text = GOOD + "[eras.bog]\nadapters = { moss = 1.0 }\nalternative = { ferns = 1.0 }\n"
    assert complaint(tmp_path, text) == f"eras.bog.alternative.ferns: {todo}"


def test_an_era_must_not_have_the_name_of_a_lora(tmp_path: Path) -> None:
    text = GOOD + "[eras.moss]\nadapters = { moss = 1.0 }\n"
    assert complaint(tmp_path, text).startswith("eras.moss: a LoRA has this name")


@pytest.mark.parametrize("name", ["a/b", "../a", ".hidden", "-x", "", "a b", "ä", "a\\n", "x" * 65])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    text = GOOD + f'[eras."{name}"]\nadapters = {{ moss = 1.0 }}\n'
    assert "a name begins with a letter or digit" in complaint(tmp_path, text)


def test_names_may_have_capitals_dots_and_64_characters(tmp_path: Path) -> None:
    name = "Bog_1.0-" + "x" * 56
    text = GOOD + f'[eras."{name}"]\nadapters = {{ moss = 1.0 }}\n'
    assert list(load_catalog(write(tmp_path, text)).eras) == [name]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("steps = 4", "steps = 0", "models.tiny.steps"),
        ("steps = 4", "steps = 4.0", "models.tiny.steps"),
        ("steps = 4", "steps = true", "models.tiny.steps"),
        ("steps = 4", 'steps = "4"', "models.tiny.steps"),
        ("cfg = 1", "cfg = nan", "models.tiny.cfg"),
        ("cfg = 1", "cfg = 21", "models.tiny.cfg"),
        ('"lcm"', '"plms"', "models.tiny.scheduler"),
        ("beta_start = 0.1", "beta_start = inf", "models.tiny.scheduler_config.beta_start"),
        ("beta_start = 0.1", "beta_start = nan", "models.tiny.scheduler_config.beta_start"),
        ("beta_start = 0.1", "beta_start = [1]", "models.tiny.scheduler_config.beta_start"),
        ("beta_start = 0.1", "beta_start = 2020-01-01", "models.tiny.scheduler_config.beta_start"),
        ("[loras.moss]", "[loras.moss]\nweight = inf", "loras.moss.weight"),
        ("size_bytes = 8", "size_bytes = 0", "loras.moss.source.size_bytes"),
        ("size_bytes = 8", 'sha256 = "abc"', "loras.moss.source.sha256"),
        ("size_bytes = 8", 'files = ["*"]', "loras.moss.source"),
        ('files = ["*.json"]', "size_bytes = 8", "models.tiny.base_source"),
        ("*.json", "unet/*.bin", "models.tiny.base_source.files.0"),
        ("*.json", "", "models.tiny.base_source.files.0"),
        ("hf://owner/repo@v1", "hf://owner/repo/a.safetensors", "models.tiny.base_source"),
        ('{ uri = "weights/tiny.safetensors" }', "3", "models.tiny.source"),
    ],
)
def test_values_out_of_range(tmp_path: Path, old: str, new: str, key: str) -> None:
    assert old in GOOD
    assert complaint(tmp_path, GOOD.replace(old, new)).startswith(f"{key}: ")


def test_a_catalogue_has_a_model(tmp_path: Path) -> None:
    assert complaint(tmp_path, "") == "models: is missing"
    assert complaint(tmp_path, "[models]\n").startswith("models: ")


def test_a_source_may_be_its_uri_alone(tmp_path: Path) -> None:
    text = GOOD.replace('{ uri = "weights/tiny.safetensors" }', '"weights/tiny.safetensors"')
    assert load_catalog(write(tmp_path, text)) == load_catalog(write(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            '[controlnets.sdxl_small]\nsource = "https://example.org/c.safetensors"',
            "controlnets.sdxl_small.source: must be a folder: hf://owner/repo or a local one",
        ),
        (
            '[loras.fern]\nsource = "hf://owner/repo"',
            "loras.fern.source: must be one file: hf://owner/repo/FILE",
        ),
        (
            '[controlnets.depth]\nsource = "hf://owner/depth"',
            "controlnets: none is called sdxl_small, which requests use that name none; "
            "give one this name",
        ),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, entry: str, message: str) -> None:
    assert complaint(tmp_path, f"{GOOD}{entry}\n") == message


@pytest.mark.parametrize("stated", ["size_bytes = 9", 'size_bytes = 8, sha256 = "%s"'])
def test_one_file_is_stated_once(tmp_path: Path, stated: str) -> None:
    source = 'source = { uri = "https://example.org/moss.safetensors", STATED }'.replace
    text = GOOD + "[loras.fern]\n" + source("STATED", stated.replace("%s", "a" * 64)) + "\n"
    if "sha256" in stated:
        load_catalog(write(tmp_path, text))  # the same length, and more is said
        text += "[loras.bog]\n" + source("STATED", f'sha256 = "{"b" * 64}"') + "\n"
        fault = "loras.bog.source: sha256 is not the one of loras.fern.source"
    else:
        fault = "loras.fern.source: size_bytes is not the one of loras.moss.source"
    assert complaint(tmp_path, text) == f"{fault}, which is the same file"


def test_a_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    assert "nested too deep" in complaint(tmp_path, f"a = {'[' * 5000}")


def test_a_path_with_a_nul() -> None:
    with pytest.raises(CatalogError, match="a catalogue is experimance or embedded"):
        load_catalog("mine\0.toml")


# -- built on a shipped one -------------------------------------------------------------------

OWN_MODEL = """
extends = "experimance"
remove = { eras = ["ruins"], models = ["hyper"] }

[models.lightning]
steps = 5
source = { uri = "weights/mine.safetensors" }

[models.hyper]
source = "weights/other.safetensors"
steps = 3
cfg = 1.0
scheduler = "lcm"

[loras.moss]
source = "https://example.org/moss.safetensors"

[eras.bog]
adapters = { moss = 0.5, drone = 0.2 }
"""


def test_a_catalogue_that_extends_a_shipped_one(tmp_path: Path) -> None:
    shipped, own = load_catalog("experimance"), load_catalog(write(tmp_path, OWN_MODEL))
    assert own.name == "mine"
    lightning, theirs = own.models["lightning"], shipped.models["lightning"]
    assert lightning.steps == 5
    assert lightning.source == Source(str(tmp_path / "weights/mine.safetensors"))
    assert lightning.base_source == theirs.base_source
    assert (lightning.cfg, lightning.scheduler_config) == (theirs.cfg, theirs.scheduler_config)
    hyper = own.models["hyper"]  # removed first: nothing of it is left
    assert (hyper.base_source, dict(hyper.scheduler_config)) == (None, {})
    assert own.models["base"] == shipped.models["base"]
    assert own.controlnets == shipped.controlnets
    assert set(own.loras) == {*shipped.loras, "moss"}
    assert set(own.eras) == {*shipped.eras, "bog"} - {"ruins"}
    assert own.eras["bog"].adapters == (AdapterUse("moss", 0.5), AdapterUse("drone", 0.2))


@pytest.mark.parametrize("which", ["experimance", "embedded"])
def test_an_extension_without_changes(tmp_path: Path, which: str) -> None:
    own, shipped = load_catalog(write(tmp_path, f'extends = "{which}"\n')), load_catalog(which)
    for kind in ("models", "controlnets", "loras", "eras"):
        assert dict(getattr(own, kind)) == dict(getattr(shipped, kind))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "other.toml"', "extends: Input should be 'experimance' or 'embedded'"),
        ("extends = 3", "extends: Input should be 'experimance' or 'embedded'"),
        (
            'remove = { eras = ["ruins"] }\n' + GOOD,
            "remove: there is nothing to remove from; set extends",
        ),
        (
            'extends = "experimance"\nremove = { eras = ["runes"] }',
            "remove.eras: experimance has no 'runes'",
        ),
        (
            'extends = "experimance"\nremove = { era = ["ruins"] }',
            "remove.era: Input should be 'models', 'controlnets', 'loras' or 'eras'",
        ),
        (
            'extends = "experimance"\nremove = { loras = ["experimance_future"] }',
            "eras.future.adapters.experimance_future: there is no LoRA of this name; add "
            "[loras.experimance_future], or change or remove the era",
        ),
        (
            'extends = "experimance"\nremove = { controlnets = ["sdxl_small"] }\n'
            '[controlnets.mine]\nsource = "hf://owner/depth"',
            "controlnets: none is called sdxl_small, which requests use that name none; "
            "give one this name",
        ),
        ('extends = "embedded"\nmodels = 3', "models: must be a table"),
        (
            'extends = "embedded"\n[models]\nlightning = 3',
            "models.lightning: must be a table",
        ),
        (
            'extends = "embedded"\n[models.lightning]\nstep = 3',
            "models.lightning.step: unknown key; known here: source, base_source, steps, cfg, "
            "scheduler, scheduler_config",
        ),
        (
            'extends = "embedded"\n[models.new]\nsteps = 3',
            "models.new.source: is missing (and 2 more)",
        ),
    ],
)
def test_extensions_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert complaint(tmp_path, text) == message


# -- sources ----------------------------------------------------------------------------------

BAD_URIS = [
    "",
    "ftp://example.org/a.safetensors",
    "file:///etc/passwd",
    "http://example.org/a.safetensors",
    "http://169.254.169.254/a.safetensors",
    "https://user:secret@example.org/a.safetensors",
    "https://example.org/../a.safetensors",
    "https://example.org/a/%2E%2e/b.safetensors",
    "https://example.org//a.safetensors",
    "https://example.org/.partial-a.safetensors",
    "hf://owner/repo/.removed-x/a.safetensors",
    "https://example.org/",
    "https://../a.safetensors",
    "https:///a.safetensors",
    "https://[::1/a.safetensors",
    "https://example.org:port/a.safetensors",
    "https://example.org/model.ckpt",
    "https://example.org/model.bin?download=true",
    "package:../specs.py",
    "package:/etc",
    "hf://owner",
    "hf://owner/../x.safetensors",
    "hf://owner/repo/../x.safetensors",
    "hf://owner/repo/config.json",
    "hf://owner/repo@../main x",
    "weights/model.PT",
]


@pytest.mark.parametrize("uri", BAD_URIS)
def test_sources_that_no_catalogue_may_hold(tmp_path: Path, uri: str) -> None:
    text = GOOD.replace("https://example.org/moss.safetensors", uri).replace(", size_bytes = 8", "")
    assert complaint(tmp_path, text).startswith("loras.moss.source.uri: ")


@pytest.mark.parametrize(
    "uri",
    [
        *BAD_URIS,
        "nul\0.safetensors",
        "https://example.org/a?\n",
        f"https://example.org/{'x' * 201}",
    ],
)
def test_those_sources_have_no_place_either(uri: str) -> None:
    with pytest.raises(CatalogError):
        locate(Source(uri))


FRAGMENTS = [
    *("https://", "http://", "hf://", "gs://", "package:", "file:", "example.org", "localhost"),
    *("owner", "repo", "a.safetensors", "b", ".", "..", "...", "%2e", "%2E%2e", "%00", "%2f", "\0"),
    *(
        "/",
        "//",
        "\\",
        "@",
        "@main",
        "@../x",
        "?",
        "?a=..",
        "#",
        ":",
        ":80",
        "~",
        "~root",
        " ",
        "\n",
    ),
    *("[::1]", "\u2024\u2024", "\uff0e\uff0e", ".safetensors", ".partial-a"),
]


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=9).map("".join))
def test_whatever_a_source_says_it_stays_in_its_folder(uri: str) -> None:
    try:
        place = locate(Source(uri))
    except CatalogError:
        return
    if isinstance(place, LocalPlace):  # the operator's own file: nothing is written there
        assert not uri.startswith(("https://", "http://", "hf://", "gs://", "file:"))
        return
    kept = os.path.normpath(Path("/models", place.keep_at))
    assert len(Path(kept).relative_to("/models").parts) >= 2, "at least a host and a name"
    assert kept == str(Path("/models", place.keep_at)), "nothing in it means another folder"
    assert "\0" not in kept
