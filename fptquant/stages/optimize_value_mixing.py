"""Minimizes the fourth-power norm of value and output projections over an invertible matrix per head.

f(M) = sum |M V|^4 + sum |O M^-1|^4, separately for each key/value head. There is no closed form, but there is one for the
two things that matter first (rows of M that are scaled, and the start), and the rest is smooth, small and quick:

1. Start. For rows that look Gaussian, sum |m V|^4 is near 3 |m V|^4 / in (a norm to the fourth on the right), and f is
   least where M V V^T M^T = M^-T O^T O M^-1 has a constant diagonal: the balanced factorization of O V, followed by
   an orthogonal matrix that spreads its diagonal evenly, such as a Hadamard matrix.
2. Scales. With a_j = sum |row j of M V|^4 and b_j = sum |column j of O M^-1|^4 the best scale of row j is
   (b_j / a_j)^(1/8).
3. Quasi-Newton steps in relative coordinates, M <- (I + E) M, that is Y <- (I + E) Y, Z <- Z (I + E)^-1 for Y = M V,
   Z = O M^-1. The gradient is G = 4 (Y^3 Y^T - Z^T Z^3). The Hessian is nearly block diagonal, one 2 x 2 block for each
   pair (E_ij, E_ji), as in independent component analysis (the Picard algorithm, Ablin, Cardoso and Gramfort, 2018);
   these blocks are the starting matrix of L-BFGS. Under the constraint ``orthogonal`` E is antisymmetric and the update
   is M <- expm(E) M; steps 1 and 2 do not apply.

Everything is batched over heads, deterministic, and uses no random numbers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from fptquant.transforms.value_mixing import Constraint

MEMORY = 7
"""Pairs of steps and gradient changes that L-BFGS keeps."""

SMALLEST_CURVATURE = 2.0
"""Curvatures below this multiple of f / head_dim are raised to it: the antisymmetric directions are nearly flat.

Measured on SmolLM2-135M: 0.1 needs 1.5 times as many evaluations for the same objective, most of them in line searches.
"""

SMALLEST_FLOOR = 1e-10
"""For heads that are zero altogether; squared it is still a float32."""

SUFFICIENT_DECREASE = 1e-4
LINE_SEARCH_TRIES = 8
STEP_SHRINK = 0.3
CURVATURE_EVERY = 3
"""The 2 x 2 blocks change slowly: they are computed anew every third step."""


@dataclass
class ValueMixingResult:
    """Matrices [K, D, D] and the objective of each head: at the start matrix itself, and in the end."""

    matrix: Tensor
    loss_before: Tensor
    loss_after: Tensor
    steps: int


@dataclass
class _Point:
    """One iterate of every head: M, Y = M V, Z = O M^-1, their squares, and f [K] in float64."""

    matrix: Tensor
    y: Tensor
    z: Tensor
    y2: Tensor
    z2: Tensor
    value: Tensor


def _sum64(x: Tensor) -> Tensor:
    return x.sum(-1).sum(-1, dtype=torch.float64)


def _evaluate(matrix: Tensor, values: Tensor, outputs: Tensor) -> _Point:
    y, z = matrix @ values, outputs @ torch.linalg.inv_ex(matrix).inverse
    y2, z2 = y * y, z * z
    return _Point(matrix, y, z, y2, z2, _sum64(y2 * y2) + _sum64(z2 * z2))


def value_mixing_loss(matrix: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """sum |M V|^4 + sum |O M^-1|^4 of each head, float64.

    Shape: matrix [K, D, D]; values [K, D, in]; outputs [K, rows, D]; returns [K].
    """
    return _evaluate(matrix, values, outputs).value


def balanced_factorization(values: Tensor, outputs: Tensor) -> Tensor:
    """Matrices B for which B V V^T B^T = B^-T O^T O B^-1 is diagonal.

    With V V^T = L L^T (Cholesky) and L^T (O^T O) L = U diag(s) U^T: B = diag(s^(1/4)) U^T L^-1. Computed in float64;
    the smallest singular values are raised to 1e-6 of the largest, so that heads with a missing dimension (a pruned
    one) stay invertible.

    Shape: values [K, D, in]; outputs [K, rows, D]; returns [K, D, D], float64.
    """

    def gram(x: Tensor) -> Tensor:
        product = x @ x.mT
        mean = torch.diagonal(product, dim1=-2, dim2=-1).mean(-1)
        floor = torch.where(mean > 0, 1e-12 * mean, torch.ones_like(mean))
        return product + floor[:, None, None] * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)

    lower = torch.linalg.cholesky(gram(values.double()))
    eigenvalues, vectors = torch.linalg.eigh(lower.mT @ gram(outputs.double().mT) @ lower)
    largest = eigenvalues.amax(-1, keepdim=True)
    roots = torch.maximum(eigenvalues, 1e-12 * largest).pow(0.25)
    factor: Tensor = torch.linalg.solve_triangular(lower, roots[..., None] * vectors.mT, upper=False, left=False)
    return factor


def _rescaled(point: _Point, values: Tensor, outputs: Tensor) -> _Point:
    """The same point with the best scale of every row."""
    a, b = (point.y2 * point.y2).sum(-1), (point.z2 * point.z2).sum(-2)
    scale = torch.where((a > 0) & (b > 0), (b / a).pow(0.125), torch.ones_like(a))
    return _evaluate(scale[..., None] * point.matrix, values, outputs)


def _gradient(point: _Point) -> Tensor:
    return 4 * ((point.y2 * point.y) @ point.y.mT - point.z.mT @ (point.z2 * point.z))


def _curvature(point: _Point) -> tuple[Tensor, Tensor]:
    """P [K, D, D], the second derivatives for E_ij, and C, those for E_ij with E_ji."""
    b = (point.z2 * point.z2).sum(-2)
    return 12 * (point.y2 @ point.y2.mT + point.z2.mT @ point.z2), 4 * (b[:, :, None] + b[:, None, :])


def _precondition(gradient: Tensor, curvature: tuple[Tensor, Tensor], value: Tensor, orthogonal: bool) -> Tensor:
    """Solves the 2 x 2 blocks [[P_ij, C_ij], [C_ij, P_ji]] after raising their smallest eigenvalue."""
    p, c = curvature
    floor = (SMALLEST_CURVATURE / p.shape[-1] * value).clamp_min(SMALLEST_FLOOR).to(p.dtype)[:, None, None]
    if orthogonal:
        return gradient / torch.maximum((p + p.mT) / 2 - c, floor)
    smallest = (p + p.mT) / 2 - ((p - p.mT).square() / 4 + c * c).sqrt()
    p = p + (floor - smallest).clamp_min(0)
    return (p.mT * gradient - c * gradient.mT) / (p * p.mT - c * c)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))[:, None, None]


class _History:
    """Pairs of steps and gradient changes, per head, and the two loops of L-BFGS over them."""

    def __init__(self) -> None:
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)

    def append(self, step: Tensor, change: Tensor) -> None:
        product = _dot(step, change)
        # A head that did not move, or moved through negative curvature, contributes nothing.
        usable = product > 1e-10 * (_dot(step, step) * _dot(change, change)).sqrt()
        self.pairs.append((step, change, torch.where(usable, 1 / product, torch.zeros_like(product))))

    def direction(self, gradient: Tensor, curvature: tuple[Tensor, Tensor], value: Tensor, orthogonal: bool) -> Tensor:
        q, factors = gradient, []
        for step, change, rho in reversed(self.pairs):
            factors.append(rho * _dot(step, q))
            q = q - factors[-1] * change
        q = _precondition(q, curvature, value, orthogonal)
        for (step, change, rho), factor in zip(self.pairs, reversed(factors), strict=True):
            q = q + step * (factor - rho * _dot(change, q))
        return -q


def _unit_scales(values: Tensor, outputs: Tensor, orthogonal: bool) -> tuple[Tensor, Tensor]:
    """Root mean squares of V and O by head [K, 1, 1], by which the problem is divided so that float32 suffices.

    f for V / a, O / b and M is f for V, O and sqrt(b / a) M, divided by (a b)^2. An orthogonal M leaves no such freedom:
    then a = b.
    """
    a, b = (x.square().mean((-2, -1), keepdim=True).sqrt() for x in (values, outputs))
    a, b = (torch.where(x > 0, x, torch.ones_like(x)) for x in (a, b))
    return (torch.maximum(a, b),) * 2 if orthogonal else (a, b)


def _moved(point: _Point, step: Tensor, values: Tensor, outputs: Tensor, orthogonal: bool) -> _Point:
    update = torch.linalg.matrix_exp(step) @ point.matrix if orthogonal else point.matrix + step @ point.matrix
    return _evaluate(update, values, outputs)


def _put(point: _Point, heads: Tensor, other: _Point) -> _Point:
    """``point`` with ``heads`` taken from ``other``."""
    for name in ("matrix", "y", "z", "y2", "z2", "value"):
        getattr(point, name)[heads] = getattr(other, name)
    return point


def _line_search(
    point: _Point, direction: Tensor, slope: Tensor, values: Tensor, outputs: Tensor, orthogonal: bool
) -> tuple[_Point, Tensor]:
    """The next point, and the step that each head took: shrunk until f decreases, zero where it never does."""
    length = torch.ones_like(slope)
    new = _moved(point, direction, values, outputs, orthogonal)
    for attempt in range(LINE_SEARCH_TRIES):
        # Written so that NaN (a singular I + E) counts as a failure.
        failed = ~(new.value <= point.value + SUFFICIENT_DECREASE * length * slope)
        heads = failed.nonzero()[:, 0]
        if not len(heads):
            break
        length[heads] *= STEP_SHRINK if attempt < LINE_SEARCH_TRIES - 1 else 0.0
        step = length[heads, None, None].to(direction.dtype) * direction[heads]
        there = _Point(*(getattr(point, name)[heads] for name in ("matrix", "y", "z", "y2", "z2", "value")))
        new = _put(new, heads, _moved(there, step, values[heads], outputs[heads], orthogonal))
    return new, length[:, None, None].to(direction.dtype) * direction


@torch.no_grad()
def optimize_value_mixing(
    start: Tensor,
    values: Tensor,
    outputs: Tensor,
    *,
    constraint: Constraint = "none",
    steps: int = 100,
    tolerance: float = 1e-3,
) -> ValueMixingResult:
    """Minimizes f over one matrix for each head, all heads together.

    Stops after ``steps``, or once no head's f falls by more than the share ``tolerance`` in two successive steps.
    Never ends above ``start``.

    Shape: start [K, D, D], orthogonal; values [K, D, in] (v_proj by head); outputs [K, rows, D] (columns of o_proj
    by head, those of a group's query heads stacked), same dtype, float32 or float64.
    """
    orthogonal = constraint == "orthogonal"
    start = start.to(values.dtype)
    before = value_mixing_loss(start, values, outputs)
    if steps == 0:
        return ValueMixingResult(start, before, before, 0)
    value_scale, output_scale = _unit_scales(values, outputs, orthogonal)
    matrix, taken = _minimize(start, values / value_scale, outputs / output_scale, orthogonal, steps, tolerance)
    matrix = (output_scale / value_scale).sqrt() * matrix
    after = value_mixing_loss(matrix, values, outputs)
    better = after <= before
    return ValueMixingResult(torch.where(better[:, None, None], matrix, start), before, torch.where(better, after, before), taken)


def _minimize(start: Tensor, values: Tensor, outputs: Tensor, orthogonal: bool, steps: int, tolerance: float) -> tuple[Tensor, int]:
    """The matrices, and the number of steps taken."""
    point = _evaluate(start, values, outputs)
    if not orthogonal:
        balanced = start @ balanced_factorization(values, outputs).to(values.dtype)
        point = _rescaled(_evaluate(balanced, values, outputs), values, outputs)
    history, quiet, taken = _History(), 0, 0
    gradient = _relative_gradient(point, orthogonal)
    while taken < steps and quiet < 2:
        if taken % CURVATURE_EVERY == 0:
            curvature = _curvature(point)
        direction = history.direction(gradient, curvature, point.value, orthogonal)
        slope = _dot(gradient, direction)[:, 0, 0].double()
        new, step = _line_search(point, direction, slope, values, outputs, orthogonal)
        new_gradient = _relative_gradient(new, orthogonal)
        history.append(step, new_gradient - gradient)
        decrease = (point.value - new.value) / point.value.clamp_min(torch.finfo(torch.float64).tiny)
        quiet = quiet + 1 if float(decrease.max()) < tolerance else 0
        point, gradient, taken = new, new_gradient, taken + 1
    return (point if orthogonal else _rescaled(point, values, outputs)).matrix, taken


def _relative_gradient(point: _Point, orthogonal: bool) -> Tensor:
    gradient = _gradient(point)
    return (gradient - gradient.mT) / 2 if orthogonal else gradient
