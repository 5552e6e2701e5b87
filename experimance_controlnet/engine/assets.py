"""Model files to what the runner works with: where they are, what they will take, reading them."""

from __future__ import annotations

from pathlib import Path

import torch

from experimance_controlnet.catalog.specs import Catalog, Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.checkpoint import SdxlModules, load_checkpoint, load_controlnet
from experimance_controlnet.engine.graphs import Recorder
from experimance_controlnet.engine.lora import LoraFactors, load_lora
from experimance_controlnet.engine.model import TEXT_ENCODERS, SdxlModel
from experimance_controlnet.engine.network.unet import ControlNetwork
from experimance_controlnet.engine.precision import Precision
from experimance_controlnet.engine.request import Asset
from experimance_controlnet.engine.tiers import MemoryTier
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

    def needed_bytes(self, asset: Asset) -> int:
        """About what the asset will take of the device's memory; a model with what its pictures
        take.

        Raises:
            ModelFileError: its files are missing.
        """
        path = self._file(self._source(asset))
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        weights_bytes = sum(file.stat().st_size for file in files)
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
        parked = TEXT_ENCODERS if self._tier.parks else ()
        dtype = self._precision.dtype
        modules = load_checkpoint(self._file(spec.source), base, self._device, dtype, parked)
        return SdxlModel(spec, modules, self._recorder, self._precision, self._tier)

    def read_controlnet(self, name: str) -> ControlNetwork:
        """Raises:
        ModelFileError: its files are missing, damaged or not to be trusted.
        """
        path = self._file(self._catalog.controlnets[name].source)
        return ControlNetwork(load_controlnet(path, self._device, self._precision.dtype))

    def read_lora(self, name: str, modules: SdxlModules) -> LoraFactors:
        """Raises:
        ModelFileError: its files are missing.
        BadAdapterError: it does not fit the modules.
        """
        path = self._file(self._catalog.loras[name].source)
        return load_lora(name, path, modules, self._device)

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
