"""Range setting for values that arrive in batches: activations and KV caches."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops.set_range import range_errors, range_histogram, range_minmax, range_qparams
from fptquant.quantizers.grid import Granularity, IntegerGrid, channel_layout
from fptquant.quantizers.range_method import HISTOGRAM_BINS, RangeMethod

__all__ = ["RangeMethod", "RangeSetter"]


class RangeSetter:
    """Sets a static range from batches without keeping them.

    First every batch is shown to ``observe_range`` (least and greatest value), then, where ``needs_errors``, every batch again
    to ``observe_errors`` (error of each candidate range, or a histogram); ``finish`` gives the scale and zero point. Memory:
    channels x candidates (or 2,048 steps) float64 numbers, whatever the number of batches.

    >>> from fptquant.quantizers.grid import PerTensor
    >>> setter = RangeSetter(IntegerGrid(8), PerTensor(), RangeMethod("min_max"))
    >>> setter.observe_range(torch.tensor([-1.0])); setter.observe_range(torch.tensor([127.0])); setter.finish()[0].item()
    1.0
    """

    def __init__(self, grid: IntegerGrid, granularity: Granularity, method: RangeMethod) -> None:
        self.grid, self.granularity, self.method = grid, granularity, method
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None
        self.evidence: Tensor | None = None
        self._scale_shape: tuple[int, ...] = ()

    @property
    def needs_errors(self) -> bool:
        """Whether the batches must be shown a second time."""
        return self.method.method != "min_max"

    def observe_range(self, x: Tensor) -> None:
        """First pass: widens the range to the finite values of x."""
        lo, hi = range_minmax(x, granularity=self.granularity)
        self._scale_shape = channel_layout(self.granularity, x.shape).scale_shape
        if self.lo is None or self.hi is None:
            self.lo, self.hi = lo, hi
        elif lo.shape != self.lo.shape:
            raise UserError(f"a batch with {lo.numel()} channels follows batches with {self.lo.numel()}; channels must agree")
        else:
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)

    def observe_errors(self, x: Tensor) -> None:
        """Second pass: adds x's errors under every candidate range, or its histogram."""
        if self.lo is None or self.hi is None:
            raise UserError("observe_errors comes after observe_range has seen every batch")
        if self.method.method == "percentile":
            seen = range_histogram(x, self.lo, self.hi, bins=HISTOGRAM_BINS, granularity=self.granularity)
        else:
            ratios = torch.tensor(self.method.ratios(), dtype=torch.float64, device=x.device)
            seen = range_errors(x, self.lo, self.hi, ratios, p=self.method.exponent, grid=self.grid, granularity=self.granularity)
        self.evidence = seen if self.evidence is None else self.evidence + seen

    def finish(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) in the granularity's shape; the setter is empty afterwards."""
        if self.lo is None or self.hi is None or (self.needs_errors and self.evidence is None):
            raise UserError("no values were observed: run calibration text through the model before setting ranges")
        scale, zero_point = range_qparams(self.lo, self.hi, self.evidence, method=self.method, grid=self.grid)
        self.lo = self.hi = self.evidence = None
        return scale.reshape(self._scale_shape), zero_point.reshape(self._scale_shape)
