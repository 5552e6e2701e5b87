"""What the benchmark makes of its measurements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import figures
from benchmarks.quality import is_right, psnr_db
from benchmarks.references import relative_error
from benchmarks.report import markdown

REQUEST = {"size_px": 1024}
RUN = {"id": "first"}


def empty(**versions: str) -> dict[str, Any]:
    return figures.new_results("full", {"torch": "2.11", **versions}, REQUEST)


def measured(latency_ms: float, peer_ms: float) -> dict[str, Any]:
    outcome = empty()
    peer = {"latency_ms": peer_ms, "latents_ms": 1.0, "vae_ms": 1.0}
    figures.add_part(outcome, "peers", "peers", {"eager": peer}, RUN)
    figures.add_part(outcome, "fp16", "latency", {"latency": {"latency_ms": latency_ms}}, RUN)
    return outcome


def test_a_ratio_is_the_peer_over_ours() -> None:
    drawn = figures.with_figures(measured(latency_ms=200, peer_ms=500))["fp16"]
    assert drawn["ratio_vs_eager"] == 2.5
    assert drawn["ratio_vs_compile"] is None
    assert drawn["ratios_of_one_run"] is True


def test_a_ratio_of_two_runs_is_named_so() -> None:
    outcome = measured(latency_ms=200, peer_ms=500)
    later = {"latency": {"latency_ms": 100}}
    figures.add_part(outcome, "fp16", "latency", later, {"id": "second"})
    drawn = figures.with_figures(outcome)["fp16"]
    assert drawn["ratio_vs_eager"] == 5
    assert drawn["ratios_of_one_run"] is False


def test_a_failed_part_is_replaced_when_it_succeeds() -> None:
    outcome = empty()
    figures.add_part(outcome, "peers", "compile", {"compile": {"error": "no compiler"}}, RUN)
    assert list(figures.peer_rows(outcome)) == [("peer, L6", "latency_ms", "latents_ms", "vae_ms")]
    row = {"latency_ms": 1.5, "latents_ms": 1.0, "vae_ms": 0.5}
    figures.add_part(outcome, "peers", "compile", {"compile": row}, RUN)
    assert list(figures.peer_rows(outcome))[1] == ("compile", "1.5", "1", "0.5")


def test_a_later_run_fills_the_file_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    figures.save(figures.with_figures(measured(latency_ms=200, peer_ms=500)), path)
    later = empty()
    figures.keep_earlier(later, path)
    figures.add_part(later, "fp16", "vae", {"vae": {"vae_ms": 20.0}}, {"id": "second"})
    drawn = figures.with_figures(later)["fp16"]
    assert (drawn["l6_latency_ms"], drawn["vae_ms"]) == (200, 20)


def test_figures_of_other_versions_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    figures.save(empty(), path)
    with pytest.raises(figures.VersionsDifferError, match=r"2\.12"):
        figures.keep_earlier(empty(torch="2.12"), path)


def test_nothing_to_keep_is_no_fault(tmp_path: Path) -> None:
    outcome = empty()
    figures.keep_earlier(outcome, tmp_path / "none.json")
    assert outcome["measured"] == {}


@pytest.mark.parametrize("wrong", [0.5, math.nan, math.inf])
def test_a_wrong_prediction_at_any_step_is_wrong(wrong: float) -> None:
    sensitivity = {"prompt": 0.1}
    assert is_right("fp16", {"plain": [0.001, 0.002]}, sensitivity)
    assert not is_right("fp16", {"plain": [0.001, wrong]}, sensitivity)


@pytest.mark.parametrize("blind", [0.0, math.nan])
def test_weights_that_do_not_see_an_input_prove_nothing(blind: float) -> None:
    assert not is_right("fp16", {"plain": [0.001]}, {"prompt": 0.1, "depth": blind})


def test_a_nan_among_the_errors_is_shown() -> None:
    outcome = measured(latency_ms=200, peer_ms=500)
    verify = {"unet_relative_error": {"adapters": [0.1, math.nan, 0.2]}, "right": False}
    figures.add_part(outcome, "fp16", "verify", {"verify": verify}, RUN)
    assert math.isnan(figures.with_figures(outcome)["fp16"]["unet_relative_error"])


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference * 1.1, reference) == pytest.approx(0.1, rel=1e-5)
    assert math.isnan(relative_error(reference * math.nan, reference))


def test_psnr() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    assert psnr_db(grey, grey) == 99
    # one level everywhere: 20 log10(255)
    assert psnr_db(grey, grey + np.uint8(1)) == pytest.approx(48.13, abs=0.01)


def test_the_markdown_table() -> None:
    assert markdown([("", "fp16"), ("VAE", "20")]) == "|  | fp16 |\n| --- | --- |\n| VAE | 20 |"
