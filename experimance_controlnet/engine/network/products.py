"""The widest matrix products of a transformer block, with what their precision asks of the kernels
around them. Here is what any precision offers, and half precision; ``fp8.py`` is the other.

A product takes the residual stream as the kernel before it sees it: ``hidden``, and the ``update``
that is still to be added. So it decides itself in which form LayerNorm hands its input on.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from experimance_controlnet.engine import kernels


class NormedProduct(Protocol):
    """``LayerNorm(hidden + update) @ weight.T``, without a bias."""

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor | None, norm: nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` and ``update`` (M, C). Returns their sum and the product (M, N)."""
        ...


class FeedForward(Protocol):
    """GEGLU between two products, of ``LayerNorm(hidden + update)``."""

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor, norm: nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All (M, C). Returns the stream and its next update: their sum is what counts, since a
        precision may add the last bias to either.
        """
        ...


class Products(Protocol):
    """Makes the products of one network, all in one precision."""

    def normed(self, weight: torch.Tensor) -> NormedProduct:
        """``weight`` (N, C) may be overwritten later, but stays where it is."""
        ...

    def feed_forward(self, widen: nn.Linear, narrow: nn.Linear) -> FeedForward:
        """``widen`` makes values and gates of its input, ``narrow`` takes what GEGLU left."""
        ...

    def weights_changed(self) -> None:
        """Weights were overwritten: adapters are merged or unmerged. Also once, when all products
        are made.
        """
        ...


class HalfProducts:
    """Products in the precision of the weights, and of the weights themselves."""

    def normed(self, weight: torch.Tensor) -> NormedProduct:
        return _HalfNormedProduct(weight)

    def feed_forward(self, widen: nn.Linear, narrow: nn.Linear) -> FeedForward:
        return _HalfFeedForward(widen, narrow)

    def weights_changed(self) -> None:
        pass


class _HalfNormedProduct:
    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor | None, norm: nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if update is None:
            normed = kernels.layer_norm(hidden, norm.weight, norm.bias, norm.eps)
        else:
            hidden, normed = add_layer_norm(hidden, update, norm)
        return hidden, functional.linear(normed, self._weight)


class _HalfFeedForward:
    def __init__(self, widen: nn.Linear, narrow: nn.Linear) -> None:
        self._widen: Any = widen
        self._narrow: Any = narrow

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor, norm: nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, normed = add_layer_norm(hidden, update, norm)
        return hidden, self._narrow(kernels.geglu(self._widen(normed)))


def add_layer_norm(
    hidden: torch.Tensor, update: torch.Tensor, norm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and the module's LayerNorm of it."""
    return kernels.add_layer_norm(hidden, update, norm.weight, norm.bias, norm.eps)
