"""A CLIP text encoder, evaluated one chunk of tokens at a time and recorded as a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from experimance_controlnet.engine.graphs import Recorder, ReplayedWork
from experimance_controlnet.engine.network.attention import fastest_attention
from experimance_controlnet.engine.offload import stream_weights


@dataclass(frozen=True, slots=True)
class TextOutput:
    """What SDXL uses of an encoder; the names are transformers' and compel's."""

    hidden_states: tuple[torch.Tensor, torch.Tensor]  # the last but one and the last, (1, T, D)
    text_embeds: torch.Tensor  # (1, P): pooled


class RecordedTextEncoder:
    """Called as compel calls the module it stands for. The engine's thread only."""

    def __init__(self, module: Any, device: torch.device, recorder: Recorder) -> None:
        """``module``: CLIPTextModel or CLIPTextModelWithProjection, evaluated on ``device``."""
        self.module = module
        self.device = device
        self.dtype: torch.dtype = module.dtype
        tokens = (1, module.config.max_position_embeddings)
        self._token_ids = torch.zeros(tokens, dtype=torch.long, device=self.device)
        self._output: TextOutput | None = None
        self._recorder = recorder
        self._parked = False
        self.clear_program()

    def clear_program(self) -> None:
        """Give up what is recorded; it is recorded again when it is needed."""
        self._evaluate = ReplayedWork(self._evaluate_once, self._recorder)

    def park(self) -> None:
        """Keep the weights in the host's memory; they travel at each call. For good."""
        if self._parked:
            return
        stream_weights(self.module, self.device)
        self._parked = True
        # of weights that travel a graph would not know the place
        self._recorder = Recorder(self.device, enabled=False)
        self.clear_program()

    def __call__(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_options: Any
    ) -> TextOutput:
        """``token_ids`` (1, T). SDXL attends to its padding, so the mask masks nothing."""
        self._token_ids.copy_(token_ids, non_blocking=True)
        with fastest_attention(self.device):
            self._evaluate()
        output = self._output
        assert output is not None
        before, last = output.hidden_states
        # copies: the next prompt overwrites the buffers
        return TextOutput((before.clone(), last.clone()), output.text_embeds.clone())

    def _evaluate_once(self) -> None:
        found = self.module(self._token_ids, output_hidden_states=True, return_dict=True)
        pooled = found.text_embeds if "text_embeds" in found else found.pooler_output
        fresh = (*found.hidden_states[-2:], pooled)
        if self._output is None:
            before, last, pooled = (tensor.clone() for tensor in fresh)
            self._output = TextOutput((before, last), pooled)
            return
        kept = (*self._output.hidden_states, self._output.text_embeds)
        for target, source in zip(kept, fresh, strict=True):
            target.copy_(source)
