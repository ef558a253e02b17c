"""Rounded weights whose scales are trained: a linear layer gives them their new scales in every forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fptquant import ops


@dataclass(frozen=True)
class Rescaling:
    """What a linear layer with a rounded weight computes with while ranges are trained."""

    unrounded: Tensor
    """The weight before rounding [out, in], with which the teacher computes."""
    log_scale: Tensor | None
    """Logarithm of the new scales over those that the weight was rounded with, one for each channel or group; None if they stay."""

    def output_factor(self) -> Tensor | None:
        """By what to multiply the layer's outputs [out] in place of the weight's rows, which would be copied; None for groups."""
        if self.log_scale is None or self.log_scale.numel() != self.unrounded.shape[0]:
            return None
        return self.log_scale.reshape(-1).exp()

    def weight(self, rounded: Tensor) -> Tensor:
        """The rounded weight [out, in] with the new scales and the same integers; differentiable in ``log_scale``."""
        if self.log_scale is None:
            return rounded
        row = self.log_scale.reshape(-1)
        return ops.merge_scale(rounded.reshape(len(row), -1), row).view_as(rounded)
