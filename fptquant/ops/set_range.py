"""Static ranges: statistics of values seen in any number of batches, and the scale and zero point they lead to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference_ranges
from fptquant.quantizers.grid import Granularity, IntegerGrid, Layout, PerChannel, PerTensor, channel_layout
from fptquant.quantizers.range_method import HISTOGRAM_BINS, RULES, RangeMethod

_CHUNK = 4096
"""Channels whose histograms are held at once."""

_library.define("range_minmax(Tensor x, int channels, int inner) -> (Tensor, Tensor)")
_library.define(
    "range_errors(Tensor x, Tensor lo, Tensor hi, Tensor ratios, int inner, float p, bool symmetric, int grid, int qmin, "
    "int qmax) -> Tensor"
)
_library.define("range_histogram(Tensor x, Tensor lo, Tensor hi, int inner, int bins) -> Tensor")
_library.define(
    "range_qparams(Tensor lo, Tensor hi, Tensor evidence, Tensor ratios, int rule, float percentile, bool symmetric, "
    "int grid, int qmin, int qmax) -> (Tensor, Tensor)"
)
for _name in ("range_minmax", "range_errors", "range_histogram", "range_qparams"):
    _library.fallback(_name, getattr(reference_ranges, _name))


def _fake_minmax(x: Tensor, channels: int, inner: int) -> tuple[Tensor, Tensor]:
    lo = x.new_empty((channels,), dtype=_library.compute_dtype(x))
    return lo, torch.empty_like(lo)


def _fake_errors(x: Tensor, lo: Tensor, hi: Tensor, ratios: Tensor, *options: Any) -> Tensor:
    return x.new_empty((lo.numel(), ratios.numel()), dtype=torch.float64)


_library.fake("range_minmax", _fake_minmax)
_library.fake("range_errors", _fake_errors)
_library.fake("range_histogram", lambda x, lo, hi, inner, bins: x.new_empty((lo.numel(), bins), dtype=torch.float64))
_library.fake("range_qparams", lambda lo, hi, *rest: (torch.empty_like(lo), torch.empty_like(hi)))
_minmax = _library.operator("range_minmax")
_errors = _library.operator("range_errors")
_histogram = _library.operator("range_histogram")
_qparams = _library.operator("range_qparams")


def range_minmax(x: Tensor, *, granularity: Granularity = PerTensor()) -> tuple[Tensor, Tensor]:  # noqa: B008
    """The least and the greatest finite value of each channel.

    Shape:
        x: any. Returns (lo, hi), each flat [channels] of ``channel_layout(granularity, x.shape)``, float32 (float64 for
        float64 x); (inf, -inf) for a channel without a finite value.

    >>> range_minmax(torch.tensor([3.0, -1.0, float("nan")]))
    (tensor([-1.]), tensor([3.]))
    """
    layout = channel_layout(granularity, x.shape)
    lo, hi = _minmax(x.detach().contiguous(), layout.channels, layout.inner)
    return lo, hi


def range_errors(
    x: Tensor, lo: Tensor, hi: Tensor, ratios: Tensor, *, p: float, grid: IntegerGrid, granularity: Granularity
) -> Tensor:
    """The error of each candidate range: errors[c, k] = sum |x - fake_quant(x)|^p, range = ratios[k] * (lo[c], hi[c]).

    Shape:
        x: any; lo, hi: [channels]; ratios: [candidates] in (0, 1], float64. Returns [channels, candidates] float64; errors of
        several batches may be added.

    Raises:
        RuntimeError: if p lies outside 2..4 or a ratio outside (0, 1].
    """
    inner = channel_layout(granularity, x.shape).inner
    options = (inner, float(p), grid.symmetric, grid.kind, grid.qmin, grid.qmax)
    errors: Tensor = _errors(x.detach().contiguous(), lo, hi, ratios.double(), *options)
    return errors


def range_histogram(x: Tensor, lo: Tensor, hi: Tensor, *, bins: int, granularity: Granularity) -> Tensor:
    """How many finite values of each channel lie in each of ``bins`` equal steps from lo to hi: [channels, bins] float64."""
    counts: Tensor = _histogram(x.detach().contiguous(), lo, hi, channel_layout(granularity, x.shape).inner, bins)
    return counts


def range_qparams(
    lo: Tensor, hi: Tensor, evidence: Tensor | None, *, method: RangeMethod, grid: IntegerGrid
) -> tuple[Tensor, Tensor]:
    """The scale and zero point that the statistics lead to, flat [channels].

    ``evidence`` is what ``range_errors`` (mse, lp) or ``range_histogram`` (percentile) gave, None for min_max.
    """
    ratios = torch.tensor(method.ratios(), dtype=torch.float64, device=lo.device)
    if evidence is None:
        evidence = lo.new_empty((lo.numel(), 0), dtype=torch.float64)
    options = (RULES[method.method], method.percentile, grid.symmetric, grid.kind, grid.qmin, grid.qmax)
    scale, zero_point = _qparams(lo, hi, evidence, ratios, *options)
    return scale, zero_point


def _evidence(x: Tensor, lo: Tensor, hi: Tensor, method: RangeMethod, grid: IntegerGrid, granularity: Granularity) -> Tensor | None:
    """What the method needs to know beyond the least and greatest value."""
    if method.method == "min_max":
        return None
    if method.method == "percentile":
        return range_histogram(x, lo, hi, bins=HISTOGRAM_BINS, granularity=granularity)
    ratios = torch.tensor(method.ratios(), dtype=torch.float64, device=x.device)
    return range_errors(x, lo, hi, ratios, p=method.exponent, grid=grid, granularity=granularity)


def _set_range_of_chunk(x: Tensor, layout: Layout, method: RangeMethod, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    seen = x.reshape(layout.outer, -1, layout.inner)
    granularity = PerChannel(1)
    lo, hi = range_minmax(seen, granularity=granularity)
    return range_qparams(lo, hi, _evidence(seen, lo, hi, method, grid, granularity), method=method, grid=grid)


def set_range(
    x: Tensor,
    *,
    grid: IntegerGrid,
    granularity: Granularity = PerTensor(),  # noqa: B008  a frozen value
    method: RangeMethod = RangeMethod(),  # noqa: B008  a frozen value
) -> tuple[Tensor, Tensor]:
    """Chooses the static scale and zero point of each channel of a tensor that is at hand as a whole, such as a weight.

    min_max covers every value; percentile covers that share of them; mse and lp minimize sum |x - fake_quant(x)|^p over a
    grid of clipping ratios. For values that arrive in batches see ``fptquant.quantizers.ranges.RangeSetter``.

    Shape:
        x: any. Returns (scale, zero_point) of shape ``channel_layout(granularity, x.shape).scale_shape``, float32 (float64
        for float64 x). No gradient.

    Raises:
        UserError: if the granularity does not fit the shape.

    >>> set_range(torch.tensor([[-7.0, 1.0], [0.0, 14.0]]), grid=IntegerGrid(4), granularity=PerChannel(0))[0]
    tensor([1., 2.])
    """
    layout = channel_layout(granularity, x.shape)
    if layout.outer == 1 and method.method == "percentile":
        rows = x.detach().reshape(layout.channels, layout.inner)
        parts = [
            _set_range_of_chunk(part, Layout(1, len(part), layout.inner, ()), method, grid) for part in torch.split(rows, _CHUNK)
        ]
        if not parts:
            raise UserError("set_range: x has no elements")
        scale, zero_point = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    else:
        scale, zero_point = _set_range_of_chunk(x.detach(), layout, method, grid)
    return scale.reshape(layout.scale_shape), zero_point.reshape(layout.scale_shape)
