"""The module that simulates quantization at one place of a model, and sets its own range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops.reference_ranges import SCALE_STRETCH
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerTensor, PerToken
from fptquant.quantizers.ranges import RangeMethod, RangeSetter
from fptquant.quantizers.wide_buffers import WideBuffers

Mode = Literal["off", "observe_mean", "observe_range", "observe_errors", "on"]
"""``off`` and the observing modes pass values through unchanged; ``on`` simulates quantization."""


class Quantizer(WideBuffers):
    """Rounds to a grid and back: y = scale * (clamp(rint(x / scale) + zero_point, qmin, qmax) - zero_point).

    A static quantizer reads ``scale`` and ``zero_point`` from its buffers, a dynamic one computes them from each token; ``clip``,
    which training sets, multiplies the range that a dynamic one finds.
    A centered one rounds x - center and adds the center again, as if every channel had a zero point of its own: a linear layer that
    reads y can have it in its bias, and scores of queries and keys do not need it at all.
    Static ranges are set in two passes over the same batches, without keeping them: mode ``observe_range`` finds
    minimum and maximum, mode ``observe_errors`` (only if ``needs_errors``) the error of every candidate, then
    ``finish_ranges()`` fills the buffers. Centers come before, by mode ``observe_mean`` and ``finish_mean()``.

    Shape: x of any shape that the granularity fits; scale and zero_point as ``channel_layout`` says, or [groups] with a group size,
    in float32 (float64 if x is); they keep that dtype when the model is converted to a narrower one.

    Gradient: straight-through for x, LSQ for scale and zero_point (`fptquant.ops.fake_quant`).

    Raises:
        UserError: if a static quantizer is used before its range was set.
    """

    wide: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "clip", "center", "bias")
    scale: Tensor | None
    zero_point: Tensor | None
    clip: Tensor | None
    center: Tensor | None
    """What is subtracted before rounding and added after, [C], or [heads, 1, D] where there are heads; None for nothing. Keys could
    do without the addition: q . center is the same for all keys of a query, and softmax does not see it."""
    bias: Tensor | None
    """Of a weight's quantizer: what its linear adds to the outputs, [out]; None for nothing. Training sets it."""

    def __init__(
        self,
        grid: IntegerGrid,
        granularity: Granularity,
        dynamic: bool = False,
        range_method: RangeMethod | None = None,
        name: str = "",
        full_precision_tokens: int = 0,
        group_size: int | None = None,
        outlier_threshold: float | None = None,
        centered: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.granularity: Granularity = PerToken() if dynamic else granularity if group_size is None else PerChannel(1)
        self.group_size = None if dynamic else group_size
        """Static ranges of so many neighboring channels each, shared by all tokens; then ``granularity`` is that of
        `group_channels`."""
        self.dynamic = dynamic
        self.range_method = RangeMethod() if range_method is None else range_method
        self.name = name
        self.full_precision_tokens = full_precision_tokens
        """First tokens of each text that its caller marks as kept."""
        self.outlier_threshold = outlier_threshold
        """Channels in which any token of a pass is as large stay in full precision, and out of ranges (LLM.int8)."""
        self.centered = centered
        """Whether a center is to be found from calibration text."""
        self.mode: Mode = "off"
        self._setter: RangeSetter | None = None
        self._sum: Tensor | None = None
        self._seen = torch.float32

    @property
    def needs_errors(self) -> bool:
        """Whether range setting takes the second pass, ``observe_errors``."""
        return not self.dynamic and self.range_method.method != "min_max"

    @property
    def has_range(self) -> bool:
        """Whether mode ``on`` is possible: dynamic, or the range is set."""
        return self.dynamic or self.scale is not None

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Quantizes, observes or passes ``x`` through, as the mode says.

        Shape: kept: bool, broadcastable to x with as many axes; True keeps a token in full precision, and out of range
            setting.
        """
        if self.mode == "off" or x.numel() == 0:
            return x
        outliers = self._outliers(x.detach(), kept)
        inner = x if outliers is None else x.masked_fill(outliers, 0)
        if self.mode == "on":
            y = self._fake_quant(inner)
            whole = kept if outliers is None else outliers if kept is None else kept | outliers
            return y if whole is None else torch.where(whole, x, y)
        self._observe(inner, kept)
        return x

    def _outliers(self, x: Tensor, kept: Tensor | None) -> Tensor | None:
        """The channels [.., 1, C] with an outlier in any token that is not kept; None where nothing is decomposed.

        Source: Dettmers et al., LLM.int8 (arXiv 2208.07339), section 3.2.
        """
        if self.outlier_threshold is None:
            return None
        large = x.abs() >= self.outlier_threshold
        if kept is not None:
            large &= ~kept
        return large.any(dim=tuple(range(x.dim() - 1)), keepdim=True)

    def _fake_quant(self, x: Tensor) -> Tensor:
        if self.center is None:
            return self._round(x)
        center = self.center.to(x.dtype)
        return self._round(x - center) + center

    def _round(self, x: Tensor) -> Tensor:
        if self.dynamic:
            with torch.no_grad():
                scale, zero_point = ops.choose_qparams(x.detach(), grid=self.grid, clip_ratio=self.range_method.clip_ratio)
            if self.clip is not None:
                scale = scale * self.clip.to(scale.dtype)
            return ops.fake_quant(x, scale, zero_point, grid=self.grid, granularity=self.granularity)
        scale, zero = self.static_qparams(x)
        if self.group_size is None:
            return ops.fake_quant(x, scale, zero, grid=self.grid, granularity=self.granularity)
        y = ops.fake_quant(group_channels(x, self.group_size), scale, zero, grid=self.grid, granularity=self.granularity)
        return ungroup_channels(y, x.shape)

    def static_qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point in the dtype in which ``x`` is quantized; no zero point stands for 0.

        Raises:
            UserError: if no range has been set.
        """
        if self.scale is None:
            raise UserError(f"quantizer {self.name}: no range has been set; run the set_ranges stage before using it")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # an absent zero point lets the operator skip the addition; symmetric grids always have it at 0
        zero = None if self.grid.symmetric or self.zero_point is None else self.zero_point.to(dtype)
        return self.scale.to(dtype), zero

    @property
    def is_fusible(self) -> bool:
        """Whether an operator may transform and quantize at once: everything is rounded as it comes, by one static scale or in the
        range of each token, and nobody looks on.
        """
        whole = self.dynamic or (isinstance(self.granularity, PerTensor) and self.group_size is None and self.scale is not None)
        return whole and self.mode == "on" and self.outlier_threshold is None and self.center is None and not self._forward_hooks

    @torch.no_grad()
    def _observe(self, x: Tensor, kept: Tensor | None) -> None:
        x = x.detach() if kept is None else drop_kept(x.detach(), kept)
        if x.numel() == 0:
            return
        if self.mode == "observe_mean":
            self._observe_mean(x)
        if self.dynamic or self.mode == "observe_mean":
            return
        if self.center is not None:
            x = x - self.center.to(x.dtype)
        if self.group_size is not None:
            x = group_channels(x, self.group_size)
        if self.mode == "observe_range":
            if self._setter is None:
                self._setter = RangeSetter(self.grid, self.granularity, self.range_method)
            self._setter.observe_range(x)
        elif self.needs_errors:
            if self._setter is None:
                raise UserError(f"quantizer {self.name}: observe_errors needs the pass observe_range before it")
            self._setter.observe_errors(x)

    def _observe_mean(self, x: Tensor) -> None:
        """Adds up values in float64, their number behind the last channel."""
        if not self.centered:
            return
        tokens = (0, 2) if x.dim() == 4 else tuple(range(x.dim() - 1))
        summed = x.sum(tokens, dtype=torch.float64)
        count = summed.new_full((*summed.shape[:-1], 1), x.numel() / summed.numel())
        found = torch.cat([summed, count], -1)
        self._seen = torch.promote_types(x.dtype, torch.float32)
        self._sum = found if self._sum is None else self._sum + found

    @property
    def observed_sum(self) -> Tensor | None:
        """What mode ``observe_mean`` has added up so far [.., C + 1], the number of tokens last; None for nothing."""
        return self._sum

    @observed_sum.setter
    def observed_sum(self, value: Tensor) -> None:
        self._sum = value

    def finish_mean(self) -> None:
        """Turns the mean of what was observed into ``center`` and forgets it; quantizers that are not centered need nothing.

        Raises:
            UserError: if nothing was observed.
        """
        if not self.centered:
            return
        if self._sum is None:
            raise self._saw_nothing()
        center = (self._sum[..., :-1] / self._sum[..., -1:]).to(self._seen)
        self.center = center if center.dim() == 1 else center[:, None, :]
        self._sum = None

    def _saw_nothing(self) -> UserError:
        return UserError(f"quantizer {self.name} saw no value; is there calibration text besides the kept tokens?")

    @property
    def observed(self) -> RangeSetter | None:
        """What the observing modes have seen so far; None for nothing."""
        return self._setter

    def finish_ranges(self) -> None:
        """Turns what was observed into ``scale`` and ``zero_point`` and forgets it; dynamic quantizers need nothing.

        The scale is stretched as a dynamic one is. The range of probabilities is exactly [0, 1], and the two of a query whose
        scores are equal lie at 1/2: between two steps of every grid.

        Raises:
            UserError: if nothing was observed.
        """
        if self.dynamic:
            return
        if self._setter is None:
            raise self._saw_nothing()
        scale, self.zero_point = self._setter.finish()
        self.scale = scale * SCALE_STRETCH
        self._setter = None

    @torch.no_grad()
    def set_range_from(self, x: Tensor) -> None:
        """Sets the static range from one tensor in memory, for example a weight."""
        self.scale, self.zero_point = ops.set_range(
            x.detach(), grid=self.grid, granularity=self.granularity, method=self.range_method
        )

    def extra_repr(self) -> str:
        kind = "dynamic" if self.dynamic else "static"
        first = f", first {self.full_precision_tokens} kept" if self.full_precision_tokens else ""
        shared = self.granularity if self.group_size is None else f"groups of {self.group_size} channels"
        centered = ", centered" if self.centered else ""
        return f"{self.name}: {self.grid.bits} bits, {kind}, {shared}{centered}{first}, mode={self.mode}"


def group_channels(x: Tensor, group_size: int) -> Tensor:
    """Groups of neighboring channels, each with all tokens: the channels of every head where there are heads.

    Shape: x [.., T, C] or, of keys, values and queries, [B, heads, T, D]; returns [tokens, groups, group_size], where
        groups = C / group_size or heads * D / group_size, the groups of one head next to each other.

    Raises:
        UserError: if the group size does not divide the last axis.

    >>> group_channels(torch.zeros(2, 3, 8), 4).shape, group_channels(torch.zeros(2, 5, 3, 8), 4).shape
    (torch.Size([6, 2, 4]), torch.Size([6, 10, 4]))
    """
    if x.shape[-1] % group_size:
        raise UserError(f"group_size = {group_size} does not divide the {x.shape[-1]} channels; choose a divisor")
    if x.dim() == 4:
        x = x.transpose(1, 2).flatten(-2)
    return x.reshape(-1, x.shape[-1] // group_size, group_size)


def ungroup_channels(groups: Tensor, shape: Sequence[int]) -> Tensor:
    """Undoes `group_channels` of a tensor of this shape."""
    if len(shape) == 4:
        batch, heads, tokens, size = shape
        return groups.reshape(batch, tokens, heads, size).transpose(1, 2)
    return groups.reshape(tuple(shape))


def drop_kept(x: Tensor, kept: Tensor) -> Tensor:
    """Removes the tokens marked in ``kept``; the axes of ``x`` stay where they are.

    The axes along which ``kept`` varies are token axes: the first of them holds the tokens that are left, the others
    become 1. Axes of channels and heads keep size and place, so that per-channel ranges still find them.

    Shape: x [..., any]; kept: bool with as many axes, each of size 1 or that of x.

    >>> x = torch.arange(12.0).reshape(2, 3, 2)
    >>> kept = torch.tensor([[[True], [False], [False]], [[True], [False], [True]]])
    >>> drop_kept(x, kept).shape
    torch.Size([3, 1, 2])
    """
    tokens = [axis for axis in range(x.dim()) if kept.shape[axis] != 1]
    if not tokens:
        return x[:0] if bool(kept.all()) else x
    others = [axis for axis in range(x.dim()) if axis not in tokens]
    order = tokens + others
    mask = kept.reshape([kept.shape[axis] for axis in tokens])
    left = x.permute(order)[~mask]
    left = left.reshape([left.shape[0]] + [1] * (len(tokens) - 1) + [x.shape[axis] for axis in others])
    return left.permute([order.index(axis) for axis in range(x.dim())])
