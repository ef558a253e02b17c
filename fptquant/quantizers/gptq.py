"""GPTQ of one weight: its Hessian, the order of its columns, the factor of the inverse, and the rounding itself.

Columns are rounded one after the other; those that follow make up for each error so that the layer's outputs on the
calibration inputs change as little as possible, (w - q) H (w - q)^T for every row w, with H the sum of x x^T over the inputs.

Sources: Frantar et al., GPTQ, arXiv 2210.17323; the descent that may follow, Nair and Suggala, CDQuant, arXiv 2406.17542.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.quantizers.grid import PerChannel, PerGroup
from fptquant.quantizers.quantizer import Quantizer

_ROWS = 2048
"""Inputs that are summed in their own dtype before they join the float64 sum."""
_BLOCK = 256
"""Columns of the Hessian that one product gives: what lies below the diagonal is not computed."""
_MORE = 10.0
"""Factor by which the damping grows while the Hessian is not positive definite."""
_MOST = 1e3
"""Damping with which every Hessian of finite inputs is."""
_LOWEST, _HIGHEST = 0.8, 1.2
"""Multiples of a range between which a search looks."""


@dataclass(frozen=True)
class GPTQOptions:
    """How weights are rounded; the field names are those of configs."""

    act_order: bool = False
    """Columns of large inputs first: their errors can still be made up for by all others."""
    damping: float = 0.01
    """Share of the mean diagonal entry that is added to the diagonal of the Hessian."""
    static_groups: bool = True
    """Group ranges are those of the weight before rounding, instead of being set when their first column is reached."""
    clip: bool = False
    """Ranges are narrowed first, so that rounding to nearest leaves the outputs closest (`fptquant.quantizers.clip_range`)."""

    search_ranges: bool = False
    """Every row takes the multiple of its range, from 0.8 to 1.2, that leaves the least loss when its columns are rounded."""
    candidates: int = 33
    """Multiples that are tried, at equal distances; the range itself is, too."""
    descent_sweeps: int = 0
    """Passes over the columns after that, in which each goes where all others want it (`fptquant.ops.coordinate_descent_`)."""

    def __post_init__(self) -> None:
        if self.descent_sweeps < 0:
            raise UserError(f"descent_sweeps = {self.descent_sweeps} is negative; choose 0 for none")
        if self.candidates < 2:
            raise UserError(f"candidates = {self.candidates}: a search needs at least 2")
        if self.damping <= 0:
            raise UserError(
                f"damping = {self.damping}: the Hessian of few inputs has no inverse without it; choose a positive share"
            )
        changed = "clip" if self.clip else "search_ranges"
        if (self.clip or self.search_ranges) and not self.static_groups:
            raise UserError(
                f"static_groups = false sets ranges anew, {changed} = true changes those that were set; set one of them otherwise"
            )
        if self.act_order and not self.static_groups:
            raise UserError(
                "static_groups = false sets the range of a group when its first column is reached, but act_order = true takes "
                "columns of all groups in turn; set one of them otherwise"
            )


class Hessian:
    """The sum of x x^T over inputs x, in float64; of many inputs, some at a time.

    Args:
        columns: features of an input.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._upper = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds inputs, whose products are summed in float32 (float64 if they are) over 2,048 at a time.

        Shape:
            x: [..., columns]
            weights: [...], how often each input counts; once by default.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        roots = None if weights is None else weights.reshape(-1, 1).to(wide).sqrt()
        for number, rows in enumerate(torch.split(x.reshape(-1, x.shape[-1]), _ROWS)):
            values = rows.to(wide)
            if roots is not None:
                values = values * roots[number * _ROWS : (number + 1) * _ROWS]
            for begin in range(0, x.shape[-1], _BLOCK):
                end = begin + _BLOCK
                self._upper[begin:end, begin:] += values[:, begin:end].T @ values[:, begin:]

    def matrix(self) -> Tensor:
        """The sum [columns, columns], float64: no copy, nothing can be added after it."""
        for begin in range(0, len(self._upper), _BLOCK):
            end = begin + _BLOCK
            corner = self._upper[begin:end, begin:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self._upper[end:, begin:end] = self._upper[begin:end, end:].T
        return self._upper


@dataclass(frozen=True)
class Factor:
    """What rounding needs of a Hessian H, shared by all weights that read the same inputs."""

    upper: Tensor
    """U [columns, columns] float64, upper triangular, with U^T U the inverse of H with its columns in ``order``."""
    order: Tensor | None
    """Which column comes first, second, ..., [columns] int64; None for the order of the weight."""
    damping: float
    """The share that was needed: more than asked for where H was not positive definite."""
    hessian: Tensor
    """H [columns, columns] float64, neither damped nor in ``order``."""

    def damped(self) -> Tensor:
        """The H that U belongs to, its columns in ``order``: a copy."""
        order = torch.arange(len(self.hessian), device=self.hessian.device) if self.order is None else self.order
        return _damped(self.hessian, order, self.damping)


def _damped(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """A copy with its columns in ``order`` and a share of the mean diagonal entry added to the diagonal."""
    mean = float(hessian.diagonal().mean()) or 1.0  # all inputs are 0: then every rounding is as good
    damped = hessian[order[:, None], order]
    damped.diagonal().add_(damping * mean)
    return damped


def factorize(hessian: Tensor, options: GPTQOptions, name: str = "weight") -> Factor:
    """Damps a Hessian, orders its columns, and factors its inverse, which itself is never formed.

    With J the reversal of the columns, J H J = L L^T and hence H^-1 = U^T U for U = J L^-1 J, which is upper triangular.

    Shape: hessian [columns, columns] float64. Four more of this size are in memory meanwhile.

    Raises:
        UserError: names the layer if its inputs are not finite.
    """
    diagonal = hessian.diagonal()
    columns = len(hessian)
    if not bool(torch.isfinite(hessian).all()):
        raise UserError(f"the inputs of {name} hold NaN or infinity: its Hessian is not finite; check the layers before it")
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else None
    backwards = (torch.arange(columns, device=hessian.device) if order is None else order).flip(0)
    damping = options.damping
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, backwards, damping))
        if not failed:
            break
        if damping >= _MOST:
            raise UserError(f"the Hessian of {name} cannot be factored even with {damping:g} of its mean diagonal added")
        damping *= _MORE
    inverse = torch.linalg.solve_triangular(lower, torch.eye(columns, dtype=lower.dtype, device=lower.device), upper=False)
    del lower
    return Factor(inverse.flip((0, 1)), order, damping, hessian)


@torch.no_grad()
def gptq_round(weight: Tensor, quantizer: Quantizer, factor: Factor, options: GPTQOptions) -> tuple[Tensor, float]:
    """The weight with every column on the quantizer's grid, and the loss: sum over the rows of (w - q) H (w - q)^T, damped H.

    Without ``static_groups``, and with ``search_ranges``, the quantizer gets new ranges.

    Shape: weight [rows, columns], any floating dtype; returns the same. Columns are worked on in float32, or float64.

    Raises:
        UserError: if the quantizer has no range.
    """
    columns = weight.shape[1]
    work = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    scale, zero = (None if part is None else _by_row(part, weight) for part in quantizer.static_qparams(work))
    assert scale is not None
    size = columns // scale.shape[1]
    group = torch.arange(columns, device=weight.device) // size
    if factor.order is not None:
        work, group = work[:, factor.order], group[factor.order]
    work, upper = work.contiguous(), factor.upper.to(work.dtype)
    unrounded = work.clone() if options.descent_sweeps else work
    if options.search_ranges:
        _search_ranges_(work, upper, scale, zero, group, quantizer, options.candidates)
        scale = _by_row(quantizer.static_qparams(work)[0], weight)
    if options.static_groups or scale.shape[1] == 1:
        loss = float(ops.gptq_(work, upper, scale, zero, grid=quantizer.grid, group=group).sum())
    else:
        loss = _round_groups_(work, upper, scale, zero, size, quantizer)
    if options.descent_sweeps:
        hessian, grid = factor.damped().to(work.dtype), quantizer.grid
        losses = ops.coordinate_descent_(
            work, unrounded, hessian, scale, zero, grid=grid, group=group, sweeps=options.descent_sweeps
        )
        loss = float(losses.sum())
    if factor.order is not None:
        work[:, factor.order] = work.clone()
    return work.to(weight.dtype), loss


def _by_row(part: Tensor, weight: Tensor) -> Tensor:
    """Scales or zero points as [rows, groups]: those of a per-tensor range repeat."""
    if part.dim() == 2:
        return part.contiguous()
    return part.expand(len(weight))[:, None].contiguous()


def _search_ranges_(
    work: Tensor, upper: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, quantizer: Quantizer, candidates: int
) -> None:
    """Multiplies the quantizer's scales by the best multiple of each row, or of all rows if they share a scale.

    Zero points stay: a multiple of a range is that of both its ends. Of equal losses the range itself is kept, or the lower one.
    """
    tried = (_LOWEST + (_HIGHEST - _LOWEST) * index / (candidates - 1) for index in range(candidates))
    multiples = [1.0, *(multiple for multiple in tried if abs(multiple - 1) > 1e-9)]
    losses = torch.stack(
        [ops.gptq_(work.clone(), upper, scale * multiple, zero, grid=quantizer.grid, group=group) for multiple in multiples]
    )
    assert quantizer.scale is not None
    if quantizer.scale.numel() == 1:
        losses = losses.sum(1, keepdim=True)
    best = losses.new_tensor(multiples)[losses.argmin(0)]
    quantizer.scale = quantizer.scale * best.reshape(-1, *[1] * (quantizer.scale.dim() - 1)).to(quantizer.scale.dtype)


def _round_groups_(work: Tensor, upper: Tensor, scale: Tensor, zero: Tensor | None, size: int, quantizer: Quantizer) -> float:
    """Rounds group by group; each gets its range from what the errors before it have left. The quantizer gets all ranges."""
    assert isinstance(quantizer.granularity, PerGroup)
    group = torch.arange(work.shape[1], device=work.device) // size
    loss = 0.0
    for index in range(scale.shape[1]):
        begin, end = index * size, (index + 1) * size
        found, found_zero = ops.set_range(
            work[:, begin:end].contiguous(), grid=quantizer.grid, granularity=PerChannel(0), method=quantizer.range_method
        )
        scale[:, index] = found
        if zero is not None:
            zero[:, index] = found_zero
        loss += float(ops.gptq_(work, upper, scale, zero, grid=quantizer.grid, group=group, begin=begin, end=end).sum())
    quantizer.scale = scale.clone()
    quantizer.zero_point = torch.zeros_like(scale) if zero is None else zero.clone()
    return loss
