"""The benchmark of downloads, on a file too small to say anything about speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.downloads import Arrival, rows_of
from tests.benchmarks.process import run_benchmark


def test_the_benchmark_runs(tmp_path: Path) -> None:
    arguments = ("--megabytes", "3", "--repeats", "1", "--folder", str(tmp_path))
    found = run_benchmark("downloads", *arguments, out=tmp_path / "out.json", timeout_s=60)
    ours = found["rows"][0]
    assert ours["downloader"] == "ours"
    assert 0 < ours["received_s"] <= ours["usable_s"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "the large files are gone"


def test_ratios_are_to_the_best_peer() -> None:
    file = Path("file")
    arrivals = {
        "ours": [Arrival(file, 2.0, 4.0)],
        "quick": [Arrival(file, 1.0)],
        "slow": [Arrival(file, 3.0, 8.0)],
    }
    ours, quick, slow = rows_of(arrivals, {name: [1.0] for name in arrivals}, 10**9)
    assert (ours.transfer_ratio, ours.usable_ratio) == (0.5, 2.0)
    assert (quick.transfer_ratio, quick.usable_ratio, quick.usable_s) == (1.0, None, None)
    assert slow.usable_ratio == 1.0
    assert ours.mb_per_s == pytest.approx(500)
