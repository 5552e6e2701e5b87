"""The device: which one, how much of its memory is ours, how far the host may run ahead of it."""

from __future__ import annotations

import gc

import psutil
import torch

from experimance_controlnet.engine.runner import GpuMemory
from experimance_controlnet.errors import SettingsError

CONTEXT_BYTES = 900_000_000
"""What CUDA's context and the libraries' kernels take beside all tensors; 0.8 GB on an H200."""


def choose_device(wish: str) -> torch.device:
    """``auto`` is CUDA where there is one. ``wish`` is ``auto``, ``cuda`` or ``cpu``.

    Raises:
        SettingsError: CUDA is wished for and there is none.
    """
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available():
        raise SettingsError("MODEL_DEVICE (--model-device): there is no CUDA device here")
    return torch.device(wish, torch.cuda.current_device()) if wish == "cuda" else torch.device(wish)


class DeviceMemory:
    """The memory where models live: the device's, up to a limit, or the host's for the CPU."""

    def __init__(self, device: torch.device, limit_bytes: int | None = None) -> None:
        """``limit_bytes``: what the process may take of the device in all, context included.

        Raises:
            SettingsError: a limit for a CPU, one above what the device has, or below what CUDA
                itself takes.
        """
        self._device = device
        self._tensor_bytes: int | None = None  # what tensors may take; None: what there is
        if limit_bytes is None:
            return
        name = "MEMORY_LIMIT_GB (--memory-limit-gb)"
        if device.type != "cuda":
            raise SettingsError(f"{name}: limits the memory of a GPU, and models run on the CPU")
        total_bytes = torch.cuda.mem_get_info(device)[1]
        if not CONTEXT_BYTES < limit_bytes <= total_bytes:
            raise SettingsError(
                f"{name}: must be between {CONTEXT_BYTES / 1e9:.1f}, which CUDA itself takes, and "
                f"{total_bytes / 1e9:.1f}, which {torch.cuda.get_device_name(device)} has"
            )
        self._tensor_bytes = limit_bytes - CONTEXT_BYTES
        torch.cuda.set_per_process_memory_fraction(self._tensor_bytes / total_bytes, device)

    @property
    def budget_bytes(self) -> int | None:
        """What the process may take, context included: what is free now or ours already, up to the
        limit. None for a CPU.
        """
        if self._device.type != "cuda":
            return None
        ours = torch.cuda.memory_reserved(self._device) + CONTEXT_BYTES
        available = torch.cuda.mem_get_info(self._device)[0] + ours
        limit = None if self._tensor_bytes is None else self._tensor_bytes + CONTEXT_BYTES
        return available if limit is None else min(limit, available)

    def free_bytes(self) -> int:
        """What new tensors could take, if the allocator kept nothing for later."""
        if self._device.type != "cuda":
            return int(psutil.virtual_memory().available)
        free = torch.cuda.mem_get_info(self._device)[0]
        if self._tensor_bytes is None:
            return free
        return min(free, self._tensor_bytes - torch.cuda.memory_reserved(self._device))

    def use(self) -> GpuMemory | None:
        """None for a CPU. Safe on any thread."""
        if self._device.type != "cuda":
            return None
        return GpuMemory(
            allocated_bytes=torch.cuda.memory_allocated(self._device),
            reserved_bytes=torch.cuda.memory_reserved(self._device),
            total_bytes=torch.cuda.mem_get_info(self._device)[1],
        )

    def release(self) -> None:
        """Give back what nobody refers to, and what the allocator keeps for later."""
        gc.collect()  # programs that were not recorded refer to themselves
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class Pace:
    """Keeps the host one step ahead of the device, and no further: enough that the device never
    waits, little enough that a new request joins at the next step but one.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._step_before: torch.cuda.Event | None = None

    def step_launched(self) -> None:
        """Wait for the step before this one."""
        if not self._on_cuda:
            return
        event = torch.cuda.Event()
        event.record()
        if self._step_before is not None:
            self._step_before.synchronize()
        self._step_before = event
