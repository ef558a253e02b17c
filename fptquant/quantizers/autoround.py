"""AutoRound of one weight: a learned offset before rounding and learned clipping ratios of its range, by signed gradients.

    W_q = scale (clamp(round(W / scale + V) + zero_point, qmin, qmax) - zero_point),   V in [-0.5, 0.5] for each weight

Rounding passes its gradient straight through. The quantizer has found a range [low, high] before; clipping ratios in (0, 1], one
for each end of each channel or group, multiply its ends:

    scale = (alpha high - beta low) / (qmax - qmin),   zero_point = round(qmin - beta low / scale)

A symmetric grid has one ratio and no zero point: scale = alpha * the scale found. With a min-max range these are the paper's
ratios of the largest and smallest weight; a range found otherwise is narrower, and they only narrow it further. V = 0 and ratios of
1 are the start, which is rounding to nearest, bit for bit.

Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, arXiv 2309.05516.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fptquant import ops
from fptquant.quantizers.grid import PerChannel, channel_layout
from fptquant.quantizers.quantizer import Quantizer

LEAST_RATIO = 0.01
"""Clipping ratios stay above 0: a scale must be positive."""


@dataclass(frozen=True)
class AutoRoundOptions:
    """How rounding is learned; the field names are those of configs."""

    iterations: int = 200
    batch: int = 8
    """Windows of each iteration."""
    lr: float | None = None
    """First step of offsets and clipping ratios, which falls linearly to 0; None: 1 / iterations."""
    learn_clipping: bool = True
    objective: Literal["relative_mse", "mse"] = "mse"
    """The error of the block's output, of each token in proportion to its own size, or not, as in the paper."""

    def rate(self, iteration: int) -> float:
        """The step after an iteration, counted from 0.

        >>> [AutoRoundOptions(iterations=4).rate(iteration) for iteration in range(4)]
        [0.25, 0.1875, 0.125, 0.0625]
        """
        first = 1 / self.iterations if self.lr is None else self.lr
        return first * (1 - iteration / self.iterations)


class LearnedRounding:
    """Offsets and clipping ratios of one weight, and the best of them so far.

    Shape: weight [rows, columns]; weights and offsets are worked on as [channels, inner] of the quantizer's granularity, float32
        (float64 if the weight is); ratios [1 or 2, channels].

    Raises:
        UserError: if the quantizer has no range.
    """

    def __init__(self, weight: Tensor, quantizer: Quantizer, *, learn_clipping: bool = True) -> None:
        layout = channel_layout(quantizer.granularity, weight.shape)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        scale, zero = quantizer.static_qparams(wide)
        self.weight = wide.reshape(layout.channels, layout.inner)
        self.grid, self._shape, self._range_shape, self._dtype = quantizer.grid, weight.shape, scale.shape, weight.dtype
        self.scale = scale.detach().reshape(-1)
        self.zero = None if zero is None else zero.detach().reshape(-1).round()
        self.offset = torch.zeros_like(self.weight)
        self.ratios = self.scale.new_ones((1 if zero is None else 2, layout.channels))
        """Of the upper end, or of both where there is one; and of the lower end."""
        self._learned = [(self.offset, -0.5, 0.5)]
        if learn_clipping:
            self._learned.append((self.ratios, LEAST_RATIO, 1.0))
        self._best: list[Tensor] = [parameter.clone() for parameter, _, _ in self._learned]

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [channels] that the ratios stand for; the zero point is not rounded yet, `fake_quant` does."""
        if self.zero is None:
            return self.scale * self.ratios[0], None
        upper, lower = self.ratios
        steps, below = self.grid.qmax - self.grid.qmin, self.zero - self.grid.qmin
        # by what is cut off, so that ratios of 1 give the scale found to the last bit
        left = 1 - ((1 - upper) * (steps - below) + (1 - lower) * below) / steps
        scale = self.scale * left.clamp(min=LEAST_RATIO)  # less only if training has moved 0 out of the range
        return scale, self.grid.qmin + below * (lower * self.scale / scale)

    def quantized(self) -> Tensor:
        """W_q [rows, columns], in the dtype of computation, with the graph to what is learned.

        The operator's straight-through and LSQ gradients, at x = W + scale V, make the formula's: inside the grid
        d W_q / d V = scale and d W_q / d scale = round(x / scale) - W / scale; outside 0 and the clamped integer.
        """
        scale, zero = self.qparams()
        x = torch.addcmul(self.weight, self.offset, scale[:, None])
        return ops.fake_quant(x, scale, zero, grid=self.grid, granularity=PerChannel(0)).reshape(self._shape)

    def require_gradients_(self, wanted: bool) -> None:
        """Whether what is learned is part of graphs."""
        for parameter, _, _ in self._learned:
            parameter.requires_grad_(wanted)
            parameter.grad = None

    @torch.no_grad()
    def step_(self, rate: float) -> None:
        """Moves everything that is learned by ``rate`` against the sign of its gradient, which it forgets."""
        for parameter, least, most in self._learned:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad.sign_(), alpha=rate).clamp_(least, most)
            parameter.grad = None

    @torch.no_grad()
    def keep_(self) -> None:
        """Remembers the present state as the best."""
        for (parameter, _, _), best in zip(self._learned, self._best, strict=True):
            best.copy_(parameter)

    @torch.no_grad()
    def restart_(self) -> None:
        """Goes back to rounding to nearest."""
        self.offset.zero_()
        self.ratios.fill_(1.0)

    @torch.no_grad()
    def restore_(self) -> None:
        """Goes back to the best state: the start, if none was kept."""
        for (parameter, _, _), best in zip(self._learned, self._best, strict=True):
            parameter.copy_(best)

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_q, scale and zero point; a quantizer of this range leaves W_q as it is.

        Shape: W_q in dtype and shape of the weight; scale and zero point in those of the quantizer's.
        """
        scale, zero = self.qparams()
        rounded = None if zero is None else zero.round().reshape(self._range_shape)
        return self.quantized().to(self._dtype), scale.reshape(self._range_shape), rounded
