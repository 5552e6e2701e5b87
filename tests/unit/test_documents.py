"""The README says what the code does: every setting, request field and make target is in it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.figures import FIGURES
from experimance_controlnet.catalog.registry import parse_catalog
from experimance_controlnet.commands.models import parser
from experimance_controlnet.data_types import ControlNetGenerateData
from experimance_controlnet.server.problems import STATUS
from experimance_controlnet.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
OLDER_SPELLINGS = {"use_jpeg", "enable_deepcache"}
"""Fields for deployed clients, not for new ones."""


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    rows = [line for line in README.splitlines() if f"`{name.upper()}`" in line and "|" in line]
    assert rows, name
    default = Settings.model_fields[name].default
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    assert any(shown in row for row in rows), f"{name}: {shown}"


@pytest.mark.parametrize("name", sorted(set(ControlNetGenerateData.model_fields) - OLDER_SPELLINGS))
def test_every_request_field_is_documented(name: str) -> None:
    assert f"`{name}`" in README or f"`{name.removeprefix('control_guidance')}`" in README


@pytest.mark.parametrize("status", sorted({400, 404, 405, 406, 413, 415, *STATUS.values()}))
def test_every_status_is_documented(status: int) -> None:
    assert re.search(rf"\b{status}\b", README)


def test_the_example_of_a_catalogue_is_one(tmp_path: Path) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    catalog = parse_catalog(example.encode(), tmp_path / "mine.toml")
    assert catalog.models["lightning"].steps == 5
    assert "bog" in catalog.eras
    assert "ruins" not in catalog.eras


def test_the_examples_of_the_command_are_accepted() -> None:
    text = README.replace("\\\n", " ").replace("NUMBER", "1")
    examples = re.findall(r"^controlnet-worker models ([^#\n]*)", text, re.MULTILINE)
    commands = {parser().parse_args(shlex.split(example)).module for example in examples}
    assert commands == {"listing", "fetching", "checking", "removing", "adding"}


def test_every_link_leads_somewhere() -> None:
    for document in ("README.md", "ARCHITECTURE.md", "BENCHMARKS.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text("utf-8")):
            assert (ROOT / target).exists(), f"{document}: {target}"


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_of_the_benchmark_is_explained(figure: str) -> None:
    name = "ratio_vs_*" if figure.startswith("ratio_vs_") else figure
    assert f"| `{name}` |" in (ROOT / "BENCHMARKS.md").read_text("utf-8")


def test_every_file_of_the_architecture_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    names = set(re.findall(r"\b(\w+\.py)\b", text)) | set(re.findall(r"`([\w/]+\.py)`", text))
    folders = [ROOT / folder for folder in ("experimance_controlnet", "tools", "benchmarks")]
    for name in names:
        assert any([*folder.rglob(Path(name).name)] for folder in folders), name
