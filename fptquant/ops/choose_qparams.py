"""The dynamic scale and zero point of every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference_ranges
from fptquant.quantizers.grid import IntegerGrid

_library.define("choose_qparams(Tensor x, float clip_ratio, bool symmetric, int grid, int qmin, int qmax) -> (Tensor, Tensor)")
_library.fallback("choose_qparams", reference_ranges.choose_qparams)


def _fake(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _library.row_values(x), _library.row_values(x)


_library.fake("choose_qparams", _fake)
_choose = _library.operator("choose_qparams")


def choose_qparams(x: Tensor, *, grid: IntegerGrid, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Chooses the scale and zero point of each row from its own values (dynamic, per token).

    symmetric: scale = S max |x| / qmax, zero_point = 0; asymmetric: scale = S (hi - lo) / (qmax - qmin),
    zero_point = rint(qmin - lo / scale), with lo <= 0 <= hi
    and both ends multiplied by ``clip_ratio`` first. NaN and infinities are left out; a row of zeros gets scale 1.
    S = 1 + sqrt(2) / 4096 keeps values that were rounded before away from the middle between two steps, where the last bit
    of a matrix product would decide.

    Shape:
        x: [..., C]. Returns (scale, zero_point), each [..., 1], float32 (float64 for float64 x). No gradient.

    Raises:
        UserError: if x has no axis.
        RuntimeError: if clip_ratio lies outside (0, 1].

    >>> import torch
    >>> scale, zero_point = choose_qparams(torch.tensor([[-1.0, 14.0]]), grid=IntegerGrid(4, symmetric=False))
    >>> round(scale.item(), 6), zero_point.item()
    (1.000345, 1.0)
    """
    if x.dim() == 0:
        raise UserError("choose_qparams: x is a scalar; it needs at least one axis, the last one is a token's")
    scale, zero_point = _choose(x.detach().contiguous(), float(clip_ratio), grid.symmetric, grid.kind, grid.qmin, grid.qmax)
    return scale, zero_point
