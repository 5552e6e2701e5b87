"""What steers an image: prompts to embeddings, a depth map to the ControlNet's input."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType

from experimance_controlnet.engine.checkpoint import SdxlModules
from experimance_controlnet.engine.graphs import Recorder
from experimance_controlnet.engine.request import DepthImage
from experimance_controlnet.engine.text import RecordedTextEncoder
from experimance_controlnet.engine.transfers import to_device

# One digit before the point: "(at 12:30)" is a time, and weights of 10 make noise.
_WEIGHTED = re.compile(r"(?<!\\)\(([^()]+):\s*(\d(?:\.\d+)?)\s*\)")
_CHUNK_TOKENS = 77
_KNOWN_PROMPTS = 1024
"""Prompts whose tokens are kept: they are asked for several times a request."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a prompt and how much it counts."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as both tokenizers see it."""

    count: int
    """Without marks and padding. The larger of the two: they differ where a prompt holds "!", the
    padding of the second tokenizer."""
    chunks: int
    """Of 77 tokens, marks included, that the longer of the two needs."""
    ids: tuple[torch.Tensor, ...]
    """By tokenizer, (77 x its own chunks,), with marks and padding."""


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """An encoded prompt, on the device."""

    embeds: torch.Tensor  # (1, 77 x chunks, D)
    pooled: torch.Tensor  # (1, P), of the first 77 tokens, as SDXL was trained


def parse_weights(prompt: str) -> list[Fragment]:
    r"""Split ``a (red:1.3) barn`` into its fragments; there is always one.

    ``\(`` and ``\)`` are literal parentheses, and so are those without a weight.
    """
    fragments: list[Fragment] = []
    end = 0
    for match in _WEIGHTED.finditer(prompt):
        fragments += [Fragment(prompt[end : match.start()]), Fragment(match[1], float(match[2]))]
        end = match.end()
    fragments.append(Fragment(prompt[end:]))
    unescaped = [
        Fragment(part.text.replace("\\(", "(").replace("\\)", ")"), part.weight)
        for part in fragments
        if part.text.strip()
    ]
    return unescaped or [Fragment(prompt)]


class PromptEncoder:
    """Both text encoders of one model, with a cache of what they said."""

    def __init__(
        self,
        modules: SdxlModules,
        device: torch.device,
        recorder: Recorder,
        cache_chunks: int = 256,
    ) -> None:
        """``cache_chunks``: chunks of 77 tokens to keep; SDXL's take 0.3 MB each in fp16."""
        self._pairs = (
            (modules.tokenizer, RecordedTextEncoder(modules.text_encoder, device, recorder)),
            (modules.tokenizer_2, RecordedTextEncoder(modules.text_encoder_2, device, recorder)),
        )
        # of the tokenizers alone: a cache that held this object would keep its encoders alive
        tokenizers = (modules.tokenizer, modules.tokenizer_2)
        self._tokenize = lru_cache(_KNOWN_PROMPTS)(partial(_tokenize, tokenizers))
        self._device = device
        self._cache: OrderedDict[Hashable, PromptEmbedding] = OrderedDict()
        self._cache_chunks = cache_chunks
        self._cached_chunks = 0

    def clear_programs(self) -> None:
        """Give up what is recorded; it is recorded again when it is needed."""
        for _, encoder in self._pairs:
            encoder.clear_program()

    def park(self) -> None:
        """Keep the encoders in the host's memory, for good; what they said stays on the device."""
        for _, encoder in self._pairs:
            encoder.park()

    def tokens(self, prompt: str) -> Tokens:
        """The prompt's tokens; no device is needed."""
        return self._tokenize(prompt)

    def encode(self, prompt: str, chunks: int, weights_key: Hashable = None) -> PromptEmbedding:
        """Encode, padded to ``chunks`` with the embedding of nothing.

        ``weights_key`` names what is merged into the text encoders: a part of the cache's key.
        """
        key = (prompt, chunks, weights_key)
        if key not in self._cache:
            self._cache[key] = self._encode(prompt, chunks)
            self._cached_chunks += chunks
        self._cache.move_to_end(key)
        while self._cached_chunks > self._cache_chunks and len(self._cache) > 1:
            oldest = next(iter(self._cache))
            self._cached_chunks -= self._cache.pop(oldest).embeds.shape[1] // _CHUNK_TOKENS
        return self._cache[key]

    def _encode(self, prompt: str, chunks: int) -> PromptEmbedding:
        fragments = parse_weights(prompt)
        if chunks == 1 and len(fragments) == 1 and fragments[0].weight == 1.0:
            return self._encode_plain(self.tokens(prompt))
        texts, weights = _columns(fragments)
        columns = []
        for index in range(len(self._pairs)):
            provider = self._provider(index)
            embeds = provider.get_embeddings_for_weighted_prompt_fragments(
                [texts], [weights], device=self._device
            )
            while embeds.shape[1] < chunks * _CHUNK_TOKENS:
                embeds = torch.cat([embeds, provider.empty_z], dim=1)
            columns.append(embeds)
        pooled = self._provider(1).get_pooled_embeddings(["".join(texts)], device=self._device)
        return PromptEmbedding(embeds=torch.cat(columns, dim=-1), pooled=pooled)

    def _encode_plain(self, tokens: Tokens) -> PromptEmbedding:
        """One chunk without weights: nothing here waits for the device, as compel would."""
        outputs = [
            encoder(ids[None]) for (_, encoder), ids in zip(self._pairs, tokens.ids, strict=True)
        ]
        embeds = torch.cat([output.hidden_states[0] for output in outputs], dim=-1)
        return PromptEmbedding(embeds=embeds, pooled=outputs[1].text_embeds)

    def _provider(self, index: int) -> EmbeddingsProvider:
        # A fresh one each time: it remembers the embedding of nothing, which adapters change.
        tokenizer, text_encoder = self._pairs[index]
        return EmbeddingsProvider(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            truncate=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            device=self._device,
        )


def _tokenize(tokenizers: tuple[Any, Any], prompt: str) -> Tokens:
    texts, weights = _columns(parse_weights(prompt))
    counts, ids = [], []
    for tokenizer in tokenizers:
        provider = EmbeddingsProvider(tokenizer, None, truncate=False, device="cpu")
        found = provider.get_token_ids(texts, include_start_and_end_markers=False)
        padded, _, _ = provider.get_token_ids_and_expand_weights(texts, weights, device="cpu")
        counts.append(sum(map(len, found)))
        ids.append(padded)
    return Tokens(max(counts), max(map(len, ids)) // _CHUNK_TOKENS, tuple(ids))


def _columns(fragments: list[Fragment]) -> tuple[list[str], list[float]]:
    return [part.text for part in fragments], [part.weight for part in fragments]


def depth_to_control(
    depth: DepthImage, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The ControlNet's input: (1, 3, height, width) in 0..1, resized where the map is of another
    size. Resizing a depth image keeps its full precision, 16 bit included.
    """
    image = to_device(torch.from_numpy(depth), device)[None, None]  # (1, 1, h, w) fp32
    if image.shape[-2:] != (height, width):
        image = torch.nn.functional.interpolate(
            image, size=(height, width), mode="bicubic", antialias=True
        ).clamp_(0, 1)
    return image.expand(1, 3, height, width).to(dtype).contiguous()
