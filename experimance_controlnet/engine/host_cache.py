"""What left the device for want of room, in the host's memory: it comes back without the disk.

A copy stays when its asset is back on the device, since weights do not change: the next time it
leaves there is nothing to copy. Where the host is short of memory, such copies go first, then what
was used least recently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import structlog
import torch

from experimance_controlnet.engine.faults import is_fatal
from experimance_controlnet.engine.request import Asset
from experimance_controlnet.engine.resting import AtRest, Frame, Key, total_bytes

log = structlog.get_logger()

_SLAB_BYTES = 256 << 20
"""Pinning takes time a call, and torch rounds each up to a power of two: tensors share one."""
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Parked:
    """An asset whose tensors all are in the host's memory. Nobody writes them."""

    frame: Frame
    tensors: Mapping[Key, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return total_bytes(self.tensors)

    def without(self, components: Collection[str]) -> Parked:
        """The same without the tensors of these components."""
        left = {key: tensor for key, tensor in self.tensors.items() if key[0] not in components}
        return Parked(self.frame, left)


class HostCache:
    """Parked assets, in order of use. The engine's thread only; reading is safe on any."""

    def __init__(
        self, free_bytes: Callable[[], int], release: Callable[[], None], *, pin: bool
    ) -> None:
        """``free_bytes`` measures what may be taken, ``release`` gives the memory of what was
        dropped back. ``pin``: so that the device can copy by itself.
        """
        self._free_bytes = free_bytes
        self._release = release
        self._pin = pin
        # In order of use. Both are replaced and never changed, since other threads read them.
        self._copies: dict[Asset, Parked] = {}
        self._in_service: frozenset[Asset] = frozenset()  # of these: they are on the device too
        self._expected: Asset | None = None

    def names(self, kind: str) -> tuple[str, ...]:
        """Assets of that kind that are here and not on the device, least recently used first."""
        away = [asset for asset in self._copies if asset not in self._in_service]
        return tuple(asset.name for asset in away if asset.kind == kind)

    def find(self, asset: Asset) -> Parked | None:
        """What there is of an asset that is not on the device."""
        return None if asset in self._in_service else self._copies.get(asset)

    def expect(self, asset: Asset) -> None:
        """This one is wanted next: room for others is made without it."""
        self._expected = asset

    def park(self, asset: Asset, at_rest: AtRest) -> bool:
        """Keep an asset that leaves the device; the device is waited for.

        False where the host has no room for it, or cannot pin as much: then it is gone.
        """
        started_s = time.monotonic()
        before = self._copies.get(asset)
        tensors = {} if before is None else dict(before.tensors)
        self._forget(asset)
        new = {key: tensor for key, tensor in at_rest.on_device.items() if key not in tensors}
        reason: str | None = None
        try:
            if not new or self.make_room(total_bytes(new)):
                tensors |= copy_to_host(new, pin=self._pin)
            else:
                reason = "too little free memory of the host"
        except (MemoryError, RuntimeError) as error:
            if is_fatal(error):
                raise
            reason = repr(error)
        if reason is not None:
            log.warning("not_parked", **_named(asset), reason=reason)
            self._release()  # what was pinned until it failed
            return False
        parked = Parked(at_rest.frame, at_rest.on_host | tensors)
        self._copies = {**self._copies, asset: parked}
        log.info(
            f"{asset.kind}_parked",
            **_named(asset),
            parked_bytes=parked.nbytes,
            copied_bytes=total_bytes(new),
            seconds=round(time.monotonic() - started_s, 3),
        )
        return True

    def came_back(self, asset: Asset, living_here: Collection[str] = ()) -> None:
        """The asset is on the device again. ``living_here``: components whose tensors are not, and
        which whoever evaluates them may write.
        """
        copy = self._copies.get(asset)
        if copy is not None:
            self._forget(asset)
            self._in_service |= {asset}  # first: nobody must find it for a moment
            self._copies = {**self._copies, asset: copy.without(living_here)}

    def drop(self, asset: Asset) -> None:
        """Let the asset go, and with a model its LoRAs; without effect where it is not here."""
        for other in self._copies:
            of_model = asset.kind == "model" and other.model == asset.name
            if other == asset or of_model:
                self._evict(other)
        self._release()

    def make_room(self, needed_bytes: int) -> bool:
        """Drop copies until the bytes are free; none where all that may go do not suffice."""
        if self._free_bytes() >= needed_bytes:
            return True
        self._release()  # what was pinned before and is not needed now
        victims = [asset for asset in self._copies if asset != self._expected]
        victims.sort(key=lambda asset: asset not in self._in_service)  # stable: by use otherwise
        to_gain = sum(self._copies[asset].nbytes for asset in victims)
        if self._free_bytes() + to_gain < needed_bytes:
            return False
        for asset in victims:
            if self._free_bytes() >= needed_bytes:
                break
            self._evict(asset)
            self._release()
        return self._free_bytes() >= needed_bytes

    def _evict(self, asset: Asset) -> None:
        log.info("left_host_memory", **_named(asset), on_device=asset in self._in_service)
        self._forget(asset)

    def _forget(self, asset: Asset) -> None:
        self._copies = {other: copy for other, copy in self._copies.items() if other != asset}
        self._in_service -= {asset}


def copy_to_host(
    tensors: Mapping[Key, torch.Tensor], *, pin: bool, slab_bytes: int = _SLAB_BYTES
) -> dict[Key, torch.Tensor]:
    """Copies, laid out alike. All are queued at once, and waited for together.

    Raises:
        MemoryError, RuntimeError: the host has not as much memory, or cannot pin it.
    """
    places: dict[Key, tuple[int, int]] = {}  # slab, first byte
    sizes: list[int] = []  # of the slabs
    for key, tensor in tensors.items():
        if not sizes or sizes[-1] + tensor.nbytes > slab_bytes:
            sizes.append(0)
        places[key] = len(sizes) - 1, sizes[-1]
        sizes[-1] += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    slabs = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for size in sizes]
    copies: dict[Key, torch.Tensor] = {}
    for key, tensor in tensors.items():
        slab, first = places[key]
        flat = slabs[slab][first : first + tensor.nbytes].view(tensor.dtype)
        layout = torch.empty_like(tensor, device="meta")  # dense, dimensions in the same order
        copies[key] = flat.as_strided(layout.shape, layout.stride(), flat.storage_offset())
        copies[key].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


def _named(asset: Asset) -> dict[str, str]:
    return {asset.kind: asset.name}
