"""How much of the host's memory may be taken, by what the system and a container's limit say."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from experimance_controlnet.engine.host_memory import HostMemory

MB, GB = 10**6, 10**9


def free_bytes(cgroup: Path) -> int:
    return HostMemory(torch.device("cpu"), cgroup=cgroup).free_bytes()


def write(cgroup: Path, **files: str) -> None:
    for name, text in files.items():
        (cgroup / f"memory.{name}").write_text(text + "\n")


@pytest.fixture
def unlimited(tmp_path: Path) -> int:
    return free_bytes(tmp_path / "absent")


def test_a_reserve_stays_free(unlimited: int) -> None:
    memory = psutil.virtual_memory()
    expected = memory.available - max(4 * GB, 0.15 * memory.total)
    assert unlimited == pytest.approx(expected, abs=GB)


def test_more_may_be_reserved(tmp_path: Path, unlimited: int) -> None:
    host = HostMemory(torch.device("cpu"), reserve_bytes=7 * GB, cgroup=tmp_path)
    assert host.free_bytes() == pytest.approx(unlimited - 7 * GB, abs=GB)


def test_without_a_limit(tmp_path: Path, unlimited: int) -> None:
    write(tmp_path, max="max", current="1", stat="inactive_file 0")
    assert free_bytes(tmp_path) == pytest.approx(unlimited, abs=GB)


def test_a_container_has_less(tmp_path: Path) -> None:
    write(tmp_path, max=str(6 * MB), current=str(3 * MB), stat=f"anon 7\ninactive_file {2 * MB}")
    assert free_bytes(tmp_path) == 6 * MB - (3 * MB - 2 * MB) - 4 * GB


def test_an_older_container(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    stat = f"inactive_file 9\ntotal_inactive_file {MB}"
    files = {"limit_in_bytes": str(6 * MB), "usage_in_bytes": str(2 * MB), "stat": stat}
    write(tmp_path / "memory", **files)
    assert free_bytes(tmp_path) == 6 * MB - MB - 4 * GB


def test_a_limit_that_is_none(tmp_path: Path, unlimited: int) -> None:
    """Version 1 knows no word for it."""
    (tmp_path / "memory").mkdir()
    files = {"limit_in_bytes": str(2**63 - 4096), "usage_in_bytes": "1"}
    write(tmp_path / "memory", **files, stat="total_inactive_file 0")
    assert free_bytes(tmp_path) == pytest.approx(unlimited, abs=GB)
