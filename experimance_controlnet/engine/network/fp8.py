"""Products in fp8: e4m3 with one scale an output channel and one a token, results in the weights'
own precision. The kernel that makes an input quantises it on the way.

The quantised weights are copies beside the ones that adapters are merged into, 1.5 GB for SDXL.
They are written anew, in place, whenever those change: graphs stay valid.
"""

from __future__ import annotations

import torch
from torch import nn

from experimance_controlnet.engine import kernels
from experimance_controlnet.engine.kernels.quantise import (
    Quantised,
    QuantisePlan,
    WeightCopy,
    empty_quantised,
    fits,
    make_plan,
)
from experimance_controlnet.engine.network.parameters import require
from experimance_controlnet.engine.network.products import (
    FeedForward,
    HalfProducts,
    NormedProduct,
)


class Fp8Products:
    """See :class:`experimance_controlnet.engine.network.products.Products`.

    Layers whose sizes matrix units cannot take in fp8 stay as they are; SDXL has none.
    """

    def __init__(self) -> None:
        self._weights: list[_Fp8Weight] = []
        self._half = HalfProducts()
        self._plan: QuantisePlan | None = None
        self._places: list[int] = []  # where the plan believes the weights to be

    def normed(self, weight: torch.Tensor) -> NormedProduct:
        return _Fp8NormedProduct(self._add(weight)) if fits(weight) else self._half.normed(weight)

    def feed_forward(self, widen: nn.Linear, narrow: nn.Linear) -> FeedForward:
        if not (fits(widen.weight) and fits(narrow.weight)):
            return self._half.feed_forward(widen, narrow)
        return _Fp8FeedForward(self._add(widen.weight), widen, self._add(narrow.weight), narrow)

    def weights_changed(self) -> None:
        """Quantise all weights, in one launch."""
        places = [weight.source.data_ptr() for weight in self._weights]
        if self._plan is None or places != self._places:
            copies = [
                WeightCopy(weight.source.detach(), weight.quantised) for weight in self._weights
            ]
            self._plan, self._places = make_plan(copies), places
        self._plan.run()

    def _add(self, weight: torch.Tensor) -> _Fp8Weight:
        self._weights.append(_Fp8Weight(weight))
        return self._weights[-1]


class _Fp8Weight:
    """A weight and its copy."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source = source
        self.quantised = empty_quantised(source.shape, source.device)

    def __call__(self, x: Quantised) -> torch.Tensor:
        """``x @ weight.T``"""
        return kernels.scaled_product(x, self.quantised, self.source.dtype)


class _Fp8NormedProduct:
    def __init__(self, weight: _Fp8Weight) -> None:
        self._product = weight

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor | None, norm: nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if update is None:
            normed = kernels.layer_norm_quantised(hidden, norm.weight, norm.bias, norm.eps)
        else:
            hidden, normed = kernels.add_layer_norm_quantised(
                hidden, update, norm.weight, norm.bias, norm.eps
            )
        return hidden, self._product(normed)


class _Fp8FeedForward:
    """Biases are added by the kernels, not with the products: not every library that multiplies
    with row-wise scales takes one in fp16. GEGLU adds the first. What comes after the second
    differs from block to block, so the kernel that makes the stream adds that one, ahead of the
    product it belongs to.
    """

    def __init__(
        self, wide: _Fp8Weight, widen: nn.Linear, narrow: _Fp8Weight, last: nn.Linear
    ) -> None:
        require(widen.bias is not None and last.bias is not None, "feed-forward without biases")
        self._widen, self._narrow = wide, narrow
        self._wide_bias, self._last_bias = widen.bias, last.bias

    def __call__(
        self, hidden: torch.Tensor, update: torch.Tensor, norm: nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, normed = kernels.add_layer_norm_quantised(
            hidden, update, norm.weight, norm.bias, norm.eps, self._last_bias
        )
        gated = kernels.geglu_quantised(self._widen(normed), self._wide_bias)
        return hidden, self._narrow(gated)
