"""Transforms that are not merged yet: a linear layer merges them anew in every forward pass, while they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fptquant.quantizers.quantizer import Quantizer
from fptquant.transforms.base import Transform
from fptquant.transforms.down_hadamard import DownHadamard
from fptquant.transforms.kronecker import Kronecker
from fptquant.transforms.residual_rotation import ResidualRotation
from fptquant.transforms.up_scaling import UpScaling


@dataclass(frozen=True)
class Merging:
    """The transforms that one linear layer's weight goes through, in the order of merging, each with its side."""

    steps: tuple[tuple[Transform, str], ...]
    bias_steps: tuple[tuple[Transform, str], ...]
    """Those that act on the layer's output, hence on its bias too."""

    def weight(self, weight: Tensor, quantizer: Quantizer | None) -> Tensor:
        """The merged weight, quantized if the quantizer is on; differentiable in transforms and ranges.

        At most one merged copy of the weight is kept beside the quantized one. Where a trained T_r comes before another
        transform, or a Kronecker product after one, that would be two: then none is kept, and the backward pass merges again.

        Shape: weight and result [out, in].
        """
        quantized = quantizer if quantizer is not None and quantizer.mode == "on" else None
        first, last = self.steps[0][0], self.steps[-1][0]
        if len(self.steps) > 1 and (isinstance(first, ResidualRotation) or isinstance(last, Kronecker)):
            merged: Tensor = checkpoint(self._weight, weight, quantized, use_reentrant=False, preserve_rng_state=False)
            return merged
        return self._weight(weight, quantized)

    def _weight(self, weight: Tensor, quantized: Quantizer | None) -> Tensor:
        *before, (last, side) = self.steps
        scaling = before[-1][0] if before else None
        if isinstance(last, DownHadamard) and isinstance(scaling, UpScaling):
            merged = last.merge_scaled(_merge(weight, before[:-1]), scaling, side)
            return merged if quantized is None else cast(Tensor, quantized(merged))
        weight = _merge(weight, before)
        if quantized is None:
            return last.merge(weight, side)
        scale, zero_point = quantized.static_qparams(weight)
        return last.merge_fake_quant(weight, side, scale, zero_point, grid=quantized.grid, granularity=quantized.granularity)

    def bias(self, bias: Tensor) -> Tensor:
        """The merged bias [out]."""
        for transform, side in self.bias_steps:
            bias = transform.merge(bias, side)
        return bias


def _merge(weight: Tensor, steps: Sequence[tuple[Transform, str]]) -> Tensor:
    for transform, side in steps:
        weight = transform.merge(weight, side)
    return weight
