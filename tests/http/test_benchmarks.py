"""The benchmarks of the server's own work run, and leave behind what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks.process import run_benchmark


def run(benchmark: str, *arguments: str, out: Path) -> dict[str, Any]:
    """What it writes, which is also what it prints last."""
    printed = run_benchmark(benchmark, *arguments, out=out, timeout_s=200)
    assert printed["benchmark"] == benchmark
    assert printed["machine"]["cores"] > 0
    assert printed.keys() >= {"date", "command", "versions", "size_px"}
    return printed


def test_http(tmp_path: Path) -> None:
    arguments = ("--requests", "2", "--clients", "1", "--size", "256")
    result = run("http", *arguments, out=tmp_path / "http.json")
    rows = {(row["image_format"], row["answer"]): row for row in result["rows"]}
    assert rows.keys() == {(f, a) for f in ("jpeg", "png") for a in ("json", "binary")}
    for row in rows.values():
        assert (row["clients"], row["requests"]) == (1, 2)
        assert 0 < row["encode_image_ms"] < row["overhead_p50_ms"] <= row["p50_ms"]
        assert row["p50_ms"] <= row["p99_ms"]
        assert row["requests_per_s"] > 0
    assert min(result["parts_ms"].values()) > 0


def test_png(tmp_path: Path) -> None:
    result = run("png", "--size", "65", "--repeats", "1", out=tmp_path / "deep" / "png.json")
    rows = {(row["picture"], row["encoder"]): row for row in result["rows"]}
    for picture in ("landscape", "drawing", "gradient", "noise"):
        ours, baseline = rows[picture, "ours"], rows[picture, "pillow, level 1"]
        assert baseline["times_as_fast"] == baseline["size_ratio"] == 1
        assert ours["ms"] > 0
        # the figure is rounded, the sizes are whole bytes
        assert abs(ours["size_ratio"] - ours["size_bytes"] / baseline["size_bytes"]) < 1e-3
        assert ours["size_ratio"] < 1.15


def test_imports(tmp_path: Path) -> None:
    result = run_benchmark(
        "imports", "--repeats", "1", out=tmp_path / "imports.json", timeout_s=200
    )
    rows = {row["package"]: row for row in result["rows"]}
    assert rows["torch._dynamo"]["imported_by"].startswith(("diffusers.", "transformers."))
    assert rows["torch"]["ms"] > 100 and rows["torch"]["modules"] > 100
    assert sum(row["ms"] for row in rows.values()) < 1000 * result["seconds"]
    assert result["seconds_collecting_garbage"] > 0
