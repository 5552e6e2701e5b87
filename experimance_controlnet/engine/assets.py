"""Model files to what the runner works with: where they are, what they will take, reading them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from experimance_controlnet.catalog.hashes import weight_files
from experimance_controlnet.catalog.specs import Catalog, Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.checkpoint import (
    JOINED,
    SdxlModules,
    load_checkpoint,
    load_controlnet,
)
from experimance_controlnet.engine.graphs import Recorder
from experimance_controlnet.engine.host_cache import Parked
from experimance_controlnet.engine.lora import LoraFactors, load_lora
from experimance_controlnet.engine.model import TEXT_ENCODERS, SdxlModel
from experimance_controlnet.engine.network.unet import ControlNetwork
from experimance_controlnet.engine.precision import Precision
from experimance_controlnet.engine.request import Asset
from experimance_controlnet.engine.resting import Key
from experimance_controlnet.engine.tiers import MemoryTier
from experimance_controlnet.engine.transfers import copied_to, wait_for
from experimance_controlnet.engine.weights import ByteCount
from experimance_controlnet.errors import ModelFileError

_UNPARKED_SHARE = 0.76
"""Of an SDXL checkpoint's bytes: what is left without text encoders."""


class AssetReader:
    """Reads the assets of one catalogue for one device, in one precision and memory tier."""

    def __init__(
        self,
        catalog: Catalog,
        store: ModelStore,
        device: torch.device,
        precision: Precision,
        tier: MemoryTier,
        recorder: Recorder,
    ) -> None:
        """The store holds the files already: fetching them is not done here."""
        self._catalog = catalog
        self._store = store
        self._device = device
        self._precision = precision
        self._tier = tier
        self._recorder = recorder
        self._count: ByteCount | None = None  # of the latest load

    def needed_bytes(self, asset: Asset) -> int:
        """About what the asset will take of the device's memory; a model with what its pictures
        take.

        Raises:
            ModelFileError: its files are missing.
        """
        return self._with_copies(asset, self._file_bytes(asset))

    @property
    def share(self) -> float | None:
        """Of the bytes of the latest load, about how much is there; None for a LoRA from disk,
        which is small. Safe on any thread.
        """
        return None if self._count is None else self._count.share

    def _file_bytes(self, asset: Asset) -> int:
        files = weight_files(self._file(self._source(asset)))
        return sum(file.stat().st_size for file in files)

    def bytes_to_wake(self, asset: Asset, parked: Parked) -> int:
        """The same for one that is parked."""
        return self._with_copies(asset, parked.nbytes)

    def _with_copies(self, asset: Asset, weights_bytes: int) -> int:
        if asset.kind != "model":
            return weights_bytes
        if self._tier.parks:
            weights_bytes = round(weights_bytes * _UNPARKED_SHARE)
        return weights_bytes + self._precision.copies_bytes + self._tier.working_bytes

    def read_model(self, name: str) -> SdxlModel:
        """Raises:
        ModelFileError: its files are missing, damaged or not to be trusted.
        """
        spec = self._catalog.models[name]
        base = self._file(spec.base_source) if spec.base_source else None
        asset, dtype = Asset("model", name), self._precision.dtype
        self._count = count = ByteCount(self._file_bytes(asset))
        source, on_host = self._file(spec.source), self.living_on_host(asset)
        return self._model(name, load_checkpoint(source, base, self._device, dtype, on_host, count))

    def _model(self, name: str, modules: SdxlModules) -> SdxlModel:
        spec = self._catalog.models[name]
        return SdxlModel(spec, modules, self._recorder, self._precision, self._tier)

    def living_on_host(self, asset: Asset) -> Collection[str]:
        """Components that do not go to the device."""
        return TEXT_ENCODERS if asset.kind == "model" and self._tier.parks else ()

    def read_controlnet(self, name: str) -> ControlNetwork:
        """Raises:
        ModelFileError: its files are missing, damaged or not to be trusted.
        """
        path = self._file(self._catalog.controlnets[name].source)
        self._count = count = ByteCount(self._file_bytes(Asset("controlnet", name)))
        return ControlNetwork(load_controlnet(path, self._device, self._precision.dtype, count))

    def read_lora(self, name: str, modules: SdxlModules) -> LoraFactors:
        """Raises:
        ModelFileError: its files are missing.
        BadAdapterError: it does not fit the modules.
        """
        self._count = None
        path = self._file(self._catalog.loras[name].source)
        return load_lora(name, path, modules, self._device)

    def wake(self, asset: Asset, parked: Parked) -> Any:
        """What reading the asset would return, from the host's memory."""
        on_host = self.living_on_host(asset)
        self._count = ByteCount(parked.nbytes)
        placed: dict[Key, torch.Tensor] = {}
        for key, tensor in parked.tensors.items():
            # what is joined is copied to its place in the larger tensor
            stays = key[0] in on_host or JOINED.search(key[1])
            placed[key] = tensor if stays else copied_to(tensor, self._device)
            self._count.add(tensor.nbytes)
        built = parked.frame.build(placed)  # while the copies are on their way
        match asset.kind:
            case "model":
                built = self._model(asset.name, built)
            case "controlnet":
                built = ControlNetwork(built)
        wait_for(self._device)
        return built

    def _source(self, asset: Asset) -> Source:
        match asset.kind:
            case "model":
                return self._catalog.models[asset.name].source
            case "controlnet":
                return self._catalog.controlnets[asset.name].source
            case "lora":
                return self._catalog.loras[asset.name].source

    def _file(self, source: Source) -> Path:
        path = self._store.path(source)
        if path is None:
            name = source.uri.rpartition("/")[2]
            raise ModelFileError(f"The files of {name} are not on this server's disk.")
        return path
