"""Grids (which numbers a quantizer can represent) and granularities (which elements share a scale)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fptquant.errors import UserError

INTEGER_KIND = 0
"""Grid kind of the C core (``FPTQ_GRID_INTEGER``); FP8 E4M3 and block-scaled FP4 will be further kinds."""


@dataclass(frozen=True)
class IntegerGrid:
    """Integers from ``qmin`` to ``qmax``, both included.

    Symmetric grids are signed with the zero point at 0 (4 bits: -8..7); asymmetric grids are unsigned with a zero point
    (4 bits: 0..15).

    Raises:
        UserError: if ``bits`` is outside 2..8.

    >>> IntegerGrid(4).qmin, IntegerGrid(4).qmax, IntegerGrid(4, symmetric=False).qmax
    (-8, 7, 15)
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits = {self.bits}: an integer grid has 2 to 8 bits; 16 means no quantizer at all")

    @property
    def kind(self) -> int:
        return INTEGER_KIND

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of ``axis`` (the axis that is kept)."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of ``group_size`` neighbors along the last axis."""

    group_size: int = 128


@dataclass(frozen=True)
class PerToken:
    """One scale for each row: everything but the last axis is kept."""


Granularity = PerTensor | PerChannel | PerGroup | PerToken


@dataclass(frozen=True)
class Layout:
    """A tensor seen as [outer, channels, inner], contiguous, with one scale per channel of shape ``scale_shape``."""

    outer: int
    channels: int
    inner: int
    scale_shape: tuple[int, ...]


def channel_layout(granularity: Granularity, shape: Sequence[int]) -> Layout:
    """Views ``shape`` as [outer, channels, inner] so that one rule serves every granularity.

    Raises:
        UserError: if the axis does not exist or the group size does not divide the last axis.

    >>> channel_layout(PerChannel(1), (2, 3, 5, 7))
    Layout(outer=2, channels=3, inner=35, scale_shape=(3,))
    >>> channel_layout(PerGroup(4), (6, 8)).scale_shape
    (6, 2)
    """
    dims = tuple(int(n) for n in shape)
    if isinstance(granularity, PerTensor):
        return Layout(1, 1, math.prod(dims), ())
    if not dims:
        raise UserError(f"{granularity} needs a tensor with at least one axis; use PerTensor() for a scalar")
    if isinstance(granularity, PerChannel):
        if not -len(dims) <= granularity.axis < len(dims):
            raise UserError(f"{granularity}: the tensor has shape {list(dims)}, its axes are 0 to {len(dims) - 1}")
        axis = granularity.axis % len(dims)
        return Layout(math.prod(dims[:axis]), dims[axis], math.prod(dims[axis + 1 :]), (dims[axis],))
    if isinstance(granularity, PerToken):
        return Layout(1, math.prod(dims[:-1]), dims[-1], (*dims[:-1], 1))
    size = granularity.group_size
    if size < 1 or dims[-1] % size:
        raise UserError(f"group_size = {size} does not divide the last axis of shape {list(dims)}; choose a divisor of {dims[-1]}")
    return Layout(1, math.prod(dims) // size, size, (*dims[:-1], dims[-1] // size))
