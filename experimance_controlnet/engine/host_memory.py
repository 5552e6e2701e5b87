"""The memory of the device's host: how much of it may be taken for what leaves the device."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_LEAST_RESERVE_BYTES, _RESERVE_SHARE = 4_000_000_000, 0.15
"""Stays free for the system, its page cache, and what a request takes."""
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of version 2 and 1 with the limit, what is used, and how much of that is page cache."""


class HostMemory:
    """What is available beyond a reserve, within the limit of the container if there is one."""

    def __init__(
        self,
        device: torch.device,
        reserve_bytes: int = 0,
        cgroup: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        """``device``: whose copies pin memory. ``reserve_bytes`` are left for other uses than this,
        beside the reserve for all. ``cgroup``: where a container finds its limits.
        """
        self._on_cuda = device.type == "cuda"
        self._reserve_bytes = reserve_bytes
        self._cgroup = cgroup

    def free_bytes(self) -> int:
        """What may be taken; negative where the reserve is touched already."""
        memory = psutil.virtual_memory()
        total_bytes, available_bytes = int(memory.total), int(memory.available)
        limit = _limit(self._cgroup)
        if limit is not None:
            limit_bytes, used_bytes = limit
            total_bytes = min(total_bytes, limit_bytes)
            available_bytes = min(available_bytes, limit_bytes - used_bytes)
        reserve_bytes = max(_LEAST_RESERVE_BYTES, round(_RESERVE_SHARE * total_bytes))
        return available_bytes - reserve_bytes - self._reserve_bytes

    def release(self) -> None:
        """Give back the pinned memory that torch keeps for later."""
        if not self._on_cuda:
            return
        if hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()
        else:  # before torch 2.13
            torch._C._host_emptyCache()


def _limit(cgroup: Path) -> tuple[int, int] | None:
    """The bytes that this container may take and has taken, page cache apart; None: no limit."""
    for maximum, current, statistics, cached in _CGROUPS:
        if (cgroup / maximum).is_file():
            limit = (cgroup / maximum).read_text().strip()
            if limit == "max":
                return None
            lines = (cgroup / statistics).read_text().splitlines()
            cached_bytes = int(dict(line.split() for line in lines)[cached])
            return int(limit), int((cgroup / current).read_text()) - cached_bytes
    return None
