"""The GPU benchmark, all but torch.compile, on the tiny family: that it runs, not how fast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import FIGURES
from tests.benchmarks.process import run_benchmark

QUICK = (
    *("--tiny", "--skip-compile", "--repeats", "1", "--warm-up", "0", "--starts", "1"),
    *("--concurrency", "2", "--throughput-s", "1"),
    *("--quality-seeds", "1", "--reference-seeds", "1"),
)
ONLY_ON_A_GPU = {"peak_vram_gb", "l6_8gb_latency_ms"}
SKIPPED = {"ratio_vs_compile"}


def run(tmp_path: Path, *options: str) -> dict[str, Any]:
    """What it writes, which is also what it prints last."""
    models = ("--models-dir", str(tmp_path / "models"))
    out = tmp_path / "results.json"
    return run_benchmark("gpu", *QUICK, *options, *models, out=out, timeout_s=580)


@pytest.mark.timeout(600)
def test_every_part_is_measured_and_the_picture_is_right(tmp_path: Path) -> None:
    results = run(tmp_path)
    measured, figures = results["measured"], results["fp16"]

    assert set(measured["peers"]) == {"eager", "peft_adapters"}
    expected = {"verify", "vae", "switch", "latency", "throughput", "quality", "cold"}
    expected |= {"memory", "cold_single_file"}
    assert set(measured["fp16"]) == expected
    for part in (*measured["peers"].values(), *measured["fp16"].values()):
        assert part["run"]["command"].startswith("python -m benchmarks.gpu --tiny")

    assert set(FIGURES) <= set(figures)
    absent = {name for name in FIGURES if figures[name] is None}
    assert absent == ONLY_ON_A_GPU | SKIPPED
    assert all(math.isfinite(figures[name]) for name in set(FIGURES) - absent)
    assert figures["ratios_of_one_run"] is True

    # on a CPU both sides are fp32: the same picture but for rounding
    assert figures["verified"] is True
    assert figures["unet_relative_error"] < 1e-4
    assert figures["psnr_db"] > 60
    assert measured["fp16"]["quality"]["plain"]["contrast"] > 5

    # without limits, in every tier: the same picture, where none is so large that it has tiles
    tiers = measured["fp16"]["memory"]
    assert {"resident", "parked", "minimal"} == set(tiers) - {"run"}
    assert all(tiers[tier]["tier"] == tier for tier in set(tiers) - {"run"})
    assert tiers["parked"]["psnr_db"] == 99


def test_fp8_beside_fp16(tmp_path: Path) -> None:
    """On a CPU fp8 is emulated: the picture is near, and further off than fp32's."""
    results = run(tmp_path, "--precision", "fp16,fp8", "--parts", "verify,quality")
    half, fp8 = results["fp16"], results["fp8"]
    assert half["verified"] is True and fp8["verified"] is True
    assert 1e-4 < fp8["unet_relative_error"] < 0.02
    assert 30 < fp8["psnr_db"] < half["psnr_db"] - 10
