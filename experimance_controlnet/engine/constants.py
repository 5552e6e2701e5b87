"""What stays the same as long as the same requests step together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from experimance_controlnet.engine.graphs import Recorder, ReplayedWork
from experimance_controlnet.engine.network.unet import ControlNetwork, TextConstants, UnetNetwork
from experimance_controlnet.engine.request import (
    Adapter,
    Conditioning,
    Control,
    RequestState,
)


class StepConstants:
    """Prompts and depth maps of the requests in a batch, as the networks want them.

    All are buffers that stay where they are: graphs read them. What is derived from the prompts is
    recorded too, some sixty small launches that a request's first step would wait for.
    """

    def __init__(
        self,
        rows: int,
        size: tuple[int, int],
        unet: UnetNetwork,
        controls: Mapping[str, ControlNetwork],
        recorder: Recorder,
    ) -> None:
        """``size``: height and width in pixels, both divisible by 8."""
        height, width = size
        self._networks: list[UnetNetwork | ControlNetwork] = [unet, *controls.values()]
        self._names = tuple(controls)
        self._rows = rows
        # original size, crop corner and target size: the picture is whole and of this size
        time_ids = torch.tensor([[*size, 0, 0, *size]] * rows, dtype=unet.dtype)
        self._time_ids = time_ids.to(unet.device)
        self.features = {
            name: torch.zeros(
                (rows, control.channels, height // 8, width // 8),
                dtype=control.dtype,
                device=control.device,
            ).contiguous(memory_format=torch.channels_last)
            for name, control in controls.items()
        }
        """The depth maps, embedded, (R, C, H/8, W/8) by ControlNet; zeros in rows of others."""
        self._prompts: tuple[torch.Tensor, torch.Tensor] | None = None  # (R, T, D), (R, P)
        self._texts: list[TextConstants] = []  # by network
        self._derive = ReplayedWork(self._derive_once, recorder)
        self._owners: tuple[tuple[Adapter, ...], list[Conditioning]] | None = None

    @property
    def text(self) -> TextConstants:
        """The UNet's."""
        return self._texts[0]

    @property
    def control_text(self) -> dict[str, TextConstants]:
        """Each ControlNet's, by name."""
        return dict(zip(self._names, self._texts[1:], strict=True))

    def load(self, states: Sequence[RequestState]) -> None:
        """Make these requests' constants the ones in the buffers. Costs nothing where they are."""
        adapters, parts = states[0].key.adapters, [_conditioning(state) for state in states]
        if self._belongs_to(adapters, parts):
            return
        self._owners = None  # until done: an error half-way must not leave a claim behind
        first = 0
        for state, part in zip(states, parts, strict=True):
            rows = slice(first, first + state.request.rows)
            self._bring(part, state.request.control, rows)
            first = rows.stop
        self._derive()
        self._owners = adapters, parts

    def _belongs_to(self, adapters: tuple[Adapter, ...], parts: Sequence[Conditioning]) -> bool:
        if self._owners is None:
            return False
        known_adapters, known = self._owners
        return (
            known_adapters == adapters
            and len(known) == len(parts)
            and all(one is other for one, other in zip(known, parts, strict=True))
        )

    def _bring(self, part: Conditioning, control: Control | None, rows: slice) -> None:
        sources = (part.prompt_embeds, part.pooled_embeds)
        if self._prompts is None:  # their widths are known now
            self._prompts = tuple(  # type: ignore[assignment]  # mypy forgets the length
                source.new_zeros((self._rows, *source.shape[1:])) for source in sources
            )
        assert self._prompts is not None
        for buffer, source in zip(self._prompts, sources, strict=True):
            buffer[rows].copy_(source)
        for name, buffer in self.features.items():
            if control is not None and control.controlnet == name:
                assert part.control_features is not None
                buffer[rows].copy_(part.control_features)
            else:
                buffer[rows].zero_()

    def _derive_once(self) -> None:
        assert self._prompts is not None
        fresh = [
            network.text_constants(*self._prompts, self._time_ids) for network in self._networks
        ]
        if not self._texts:
            self._texts = fresh
            return
        for kept, new in zip(self._texts, fresh, strict=True):
            kept.overwrite(new)


def _conditioning(state: RequestState) -> Conditioning:
    assert state.conditioning is not None, "prepare() comes before the first step"
    return state.conditioning
