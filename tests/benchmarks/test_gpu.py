"""The GPU benchmark, all but torch.compile, on the tiny family: that it runs, not how fast."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.figures import FIGURES

ROOT = Path(__file__).parents[2]
QUICK = (
    *("--tiny", "--skip-compile", "--repeats", "1", "--warm-up", "0", "--starts", "1"),
    *("--concurrency", "2", "--throughput-s", "1"),
    *("--quality-seeds", "1", "--reference-seeds", "1"),
)
ONLY_ON_A_GPU = {"peak_vram_gb"}
SKIPPED = {"ratio_vs_compile"}


@pytest.mark.timeout(600)
def test_every_part_is_measured_and_the_picture_is_right(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    places = ("--models-dir", str(tmp_path / "models"), "--out", str(out))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *QUICK, *places],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == json.loads(out.read_text())
    measured, figures = results["measured"], results["fp16"]

    assert set(measured["peers"]) == {"eager", "peft_adapters"}
    expected = {"verify", "vae", "switch", "latency", "throughput", "quality", "cold"}
    expected |= {"cold_single_file"}
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
