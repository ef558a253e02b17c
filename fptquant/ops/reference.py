"""Every operator in plain torch: what the C core is tested against, and what runs where it has no kernel.

Each function has the signature of the operator of the same name (``fptquant::<name>``). All of them compute in float64
for float64 input and in float32 for everything narrower, and sum in float64. An absent tensor has no elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.ops._hadamard_factors import hadamard_factors
from fptquant.ops._library import compute_dtype
from fptquant.ops.reference_ranges import choose_qparams


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


def _or_absent(value: Tensor | None, like: Tensor) -> Tensor:
    """``value``, or a new absent tensor: operators may not return their own arguments."""
    return like.new_empty(0) if value is None else value


# ------------------------------------------------------------------------------------------------- fake quantization


def _grid_position(
    x: Tensor, scale: Tensor, zero_point: Tensor, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x / scale, the unclamped q, scale, zero point), all as [outer, channels, inner] or broadcastable to it."""
    scale = scale.to(compute_dtype(x)).reshape(1, -1, 1)
    zero = zero_point.to(scale.dtype).round().reshape(1, -1, 1) if zero_point.numel() else torch.zeros_like(scale)
    ratio = _wide(x).reshape(shape) / scale
    return ratio, ratio.round() + zero, scale, zero


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, outer: int, channels: int, inner: int, qmin: int, qmax: int) -> Tensor:
    """y = (clamp(rint(x / scale) + rint(zero_point), qmin, qmax) - rint(zero_point)) * scale; NaN stays NaN."""
    _, q, scale, zero = _grid_position(x, scale, zero_point, (outer, channels, inner))
    return ((q.clamp(qmin, qmax) - zero) * scale).reshape(x.shape).to(x.dtype)


def fake_quant_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    outer: int,
    channels: int,
    inner: int,
    qmin: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dzero_point): straight-through for x, the LSQ gradient for scale and zero point."""
    ratio, q, wide_scale, zero = _grid_position(x, scale, zero_point, (outer, channels, inner))
    wide_dy = dy.to(wide_scale.dtype).reshape(outer, channels, inner)
    inside = (q >= qmin) & (q <= qmax)
    slope = q.clamp(qmin, qmax) - zero - torch.where(inside, ratio, 0.0)
    dscale = (wide_dy.double() * slope.double()).sum(dim=(0, 2)).to(scale.dtype).reshape(scale.shape)
    dx = torch.where(inside, wide_dy, 0.0).reshape(x.shape).to(x.dtype)
    if not zero_point.numel():
        return dx, dscale, _or_absent(None, zero_point)
    dzero = (torch.where(inside, 0.0, wide_dy).double().sum(dim=(0, 2)) * -scale.double().reshape(-1)).to(scale.dtype)
    return dx, dscale, dzero.reshape(zero_point.shape)


# ---------------------------------------------------------------------------------------------------------- hadamard


def hadamard(x: Tensor, block_size: int, transpose: bool) -> Tensor:
    """y = H x / sqrt(n) on each block of n = block_size values of the last axis, H a Kronecker product of factors."""
    y: Tensor = _wide(x).reshape(-1, block_size)
    inner = block_size
    for factor in hadamard_factors(block_size):
        matrix = factor.to(device=x.device, dtype=y.dtype)
        inner //= matrix.shape[0]
        y = torch.matmul(matrix.t() if transpose else matrix, y.reshape(-1, matrix.shape[0], inner))
    y = (y * block_size**-0.5).reshape(x.shape)
    return y.to(x.dtype)


# ----------------------------------------------------------------------------------------------- query-key (T_k) merge


def _rotation(angle: Tensor, log_scale: Tensor, group: int, inverse: bool) -> tuple[Tensor, Tensor]:
    """(s cos a, s sin a) of every head, [heads, half, 1], computed in float64 and rounded once."""
    size = torch.exp(-log_scale.double() if inverse else log_scale.double())
    pair = (size * torch.cos(angle.double()), size * torch.sin(angle.double()))
    cosine, sine = (t.to(angle.dtype).repeat_interleave(group, dim=0).unsqueeze(-1) for t in pair)
    return cosine, sine


def _pairs(weight: Tensor, angle: Tensor, group: int) -> Tensor:
    """weight as [heads, 2, half, columns]: the two rows of every RoPE pair."""
    return _wide(weight).reshape(angle.shape[0] * group, 2, angle.shape[1], -1)


def _rotate(pairs: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = pairs[:, 0], pairs[:, 1]
    return torch.stack((cosine * first - sine * second, sine * first + cosine * second), dim=1)


def _merge_query_key_wide(weight: Tensor, angle: Tensor, log_scale: Tensor, group: int, inverse: bool) -> Tensor:
    return _rotate(_pairs(weight, angle, group), *_rotation(angle, log_scale, group, inverse))


def merge_query_key(weight: Tensor, angle: Tensor, log_scale: Tensor, group: int, inverse: bool) -> Tensor:
    """Rows i and i + half of every head, rotated by the angle and scaled by exp(+-log_scale)."""
    return _merge_query_key_wide(weight, angle, log_scale, group, inverse).reshape(weight.shape).to(weight.dtype)


def _sum_pairs(terms: Tensor, angle: Tensor, group: int) -> Tensor:
    """Sums [heads, half, columns] over the columns and over the heads of each group: [kv_heads, half]."""
    return terms.double().sum(dim=-1).reshape(angle.shape[0], group, -1).sum(dim=1).to(angle.dtype)


def merge_query_key_backward(
    dy: Tensor, weight: Tensor, angle: Tensor, log_scale: Tensor, group: int, inverse: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight or absent, dangle, dlog_scale): d y_i / d angle = -y_j and d y_j / d angle = y_i."""
    cosine, sine = _rotation(angle, log_scale, group, inverse)
    y = _rotate(_pairs(weight, angle, group), cosine, sine).double()
    wide_dy = dy.to(angle.dtype).reshape(y.shape)
    dangle = _sum_pairs(wide_dy[:, 1] * y[:, 0] - wide_dy[:, 0] * y[:, 1], angle, group)
    dlog_scale = _sum_pairs((wide_dy * y).sum(dim=1), angle, group)
    # The transpose of the map: the same scale, the opposite angle.
    dweight = _rotate(wide_dy, cosine, -sine).reshape(weight.shape).to(weight.dtype) if weight_gradient else None
    return _or_absent(dweight, weight), dangle, -dlog_scale if inverse else dlog_scale


def merge_query_key_fake_quant(
    weight: Tensor,
    angle: Tensor,
    log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: int,
    inverse: bool,
    inner: int,
    grid: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """fake_quant(merge_query_key(weight)), one scale for each run of ``inner`` columns; no rounding in between."""
    merged = _merge_query_key_wide(weight, angle, log_scale, group, inverse)
    y = fake_quant(merged, scale, zero_point, 1, scale.numel(), inner, qmin, qmax)
    return y.reshape(weight.shape).to(weight.dtype)


def merge_query_key_fake_quant_backward(
    dy: Tensor,
    weight: Tensor,
    angle: Tensor,
    log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: int,
    inverse: bool,
    inner: int,
    grid: int,
    qmin: int,
    qmax: int,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dweight or absent, dangle, dlog_scale, dscale, dzero_point)."""
    merged = _merge_query_key_wide(weight, angle, log_scale, group, inverse)
    wide_dy = dy.to(merged.dtype)
    dmerged, dscale, dzero = fake_quant_backward(wide_dy, merged, scale, zero_point, 1, scale.numel(), inner, qmin, qmax)
    rest = merge_query_key_backward(dmerged, weight, angle, log_scale, group, inverse, weight_gradient)
    return *rest, dscale, dzero


# ---------------------------------------------------------------------------------------- row and column scaling (T_u)


def _exp_scales(weight: Tensor, row_log_scale: Tensor, column_log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(row) [R, 1], exp(column) [1, C]), computed in float64 and rounded once; ones where absent."""
    one = torch.ones((1, 1), dtype=compute_dtype(weight), device=weight.device)
    rows = row_log_scale.double().exp().to(one.dtype).reshape(-1, 1) if row_log_scale.numel() else one
    columns = column_log_scale.double().exp().to(one.dtype).reshape(1, -1) if column_log_scale.numel() else one
    return rows, columns


def _merge_scale_wide(weight: Tensor, row_log_scale: Tensor, column_log_scale: Tensor) -> Tensor:
    rows, columns = _exp_scales(weight, row_log_scale, column_log_scale)
    return _wide(weight).reshape(weight.shape[0], -1) * rows * columns


def merge_scale(weight: Tensor, row_log_scale: Tensor, column_log_scale: Tensor) -> Tensor:
    """y[r, c] = weight[r, c] * exp(row_log_scale[r]) * exp(column_log_scale[c])."""
    return _merge_scale_wide(weight, row_log_scale, column_log_scale).reshape(weight.shape).to(weight.dtype)


def merge_scale_backward(
    dy: Tensor, weight: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight or absent, drow_log_scale, dcolumn_log_scale); the gradient of an absent scale is absent."""
    rows, columns = _exp_scales(weight, row_log_scale, column_log_scale)
    wide_dy = dy.to(rows.dtype).reshape(weight.shape[0], -1)
    terms = wide_dy.double() * (_wide(weight).reshape(wide_dy.shape) * rows * columns).double()
    drow = terms.sum(dim=1).to(rows.dtype) if row_log_scale.numel() else None
    dcolumn = terms.sum(dim=0).to(rows.dtype) if column_log_scale.numel() else None
    dweight = (wide_dy * rows * columns).reshape(weight.shape).to(weight.dtype) if weight_gradient else None
    return (
        _or_absent(dweight, weight),
        _or_absent(drow, row_log_scale),
        _or_absent(dcolumn, column_log_scale),
    )


def merge_scale_fake_quant(
    weight: Tensor,
    row_log_scale: Tensor,
    column_log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    inner: int,
    grid: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """fake_quant(merge_scale(weight)), one scale for each run of ``inner`` columns; no rounding in between."""
    merged = _merge_scale_wide(weight, row_log_scale, column_log_scale)
    y = fake_quant(merged, scale, zero_point, 1, scale.numel(), inner, qmin, qmax)
    return y.reshape(weight.shape).to(weight.dtype)


def merge_scale_fake_quant_backward(
    dy: Tensor,
    weight: Tensor,
    row_log_scale: Tensor,
    column_log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    inner: int,
    grid: int,
    qmin: int,
    qmax: int,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dweight or absent, drow_log_scale, dcolumn_log_scale, dscale, dzero_point)."""
    merged = _merge_scale_wide(weight, row_log_scale, column_log_scale)
    wide_dy = dy.to(merged.dtype)
    dmerged, dscale, dzero = fake_quant_backward(wide_dy, merged, scale, zero_point, 1, scale.numel(), inner, qmin, qmax)
    rest = merge_scale_backward(dmerged, weight, row_log_scale, column_log_scale, weight_gradient)
    return *rest, dscale, dzero


# ------------------------------------------------------------------------------------------------ Kronecker products


def _kronecker_blocks(x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(X right^T, left X right^T, X) of the rows of x as matrices X [rows of x, R, C], in the dtype of computation."""
    rows = len(left) if left.numel() else x.shape[-1] // len(right)
    blocks = _wide(x).reshape(-1, rows, x.shape[-1] // rows)
    inner = blocks @ right.T if right.numel() else blocks
    return inner, left @ inner if left.numel() else inner, blocks


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y = (left (x) right) x for each row of the last axis; an absent factor is the identity."""
    return _kronecker_blocks(x, left, right)[1].reshape(x.shape).to(x.dtype)


def kronecker_backward(dy: Tensor, x: Tensor, left: Tensor, right: Tensor, x_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx or absent, dleft, dright); the gradient of an absent factor is absent."""
    inner, _, blocks = _kronecker_blocks(x, left, right)
    wide_dy = dy.to(blocks.dtype).reshape(blocks.shape)
    dinner = left.T @ wide_dy if left.numel() else wide_dy
    dleft = (wide_dy @ inner.mT).double().sum(dim=0).to(left.dtype) if left.numel() else None
    dright = (dinner.mT @ blocks).double().sum(dim=0).to(right.dtype) if right.numel() else None
    dx = None
    if x_gradient:
        dx = (dinner @ right if right.numel() else dinner).reshape(x.shape).to(x.dtype)
    return _or_absent(dx, x), _or_absent(dleft, left), _or_absent(dright, right)


def kronecker_fake_quant(
    x: Tensor, left: Tensor, right: Tensor, scale: Tensor, zero_point: Tensor, grid: int, qmin: int, qmax: int
) -> Tensor:
    """fake_quant(kronecker(x)), one scale for all or one for each row; no rounding in between."""
    y = _kronecker_blocks(x, left, right)[1]
    inner = y.numel() // max(scale.numel(), 1)
    return fake_quant(y, scale, zero_point, 1, scale.numel(), inner, qmin, qmax).reshape(x.shape).to(x.dtype)


def kronecker_fake_quant_backward(
    dy: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: int,
    qmin: int,
    qmax: int,
    x_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx or absent, dleft, dright, dscale, dzero_point)."""
    y = _kronecker_blocks(x, left, right)[1]
    wide_dy, inner = dy.to(y.dtype).reshape(y.shape), y.numel() // max(scale.numel(), 1)
    dtransformed, dscale, dzero = fake_quant_backward(wide_dy, y, scale, zero_point, 1, scale.numel(), inner, qmin, qmax)
    return *kronecker_backward(dtransformed.reshape(x.shape), x, left, right, x_gradient), dscale, dzero


def kronecker_fake_quant_dynamic(
    x: Tensor, left: Tensor, right: Tensor, clip: Tensor, clip_ratio: float, symmetric: bool, grid: int, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(fake_quant(kronecker(x)) with the range of each row, their scales, their zero points); no rounding in between."""
    y = _kronecker_blocks(x, left, right)[1].reshape(x.shape)
    scale, zero = choose_qparams(y, clip_ratio, symmetric, grid, qmin, qmax)
    if clip.numel():
        scale = scale * clip.reshape(())
    return fake_quant(y, scale, zero, 1, scale.numel(), y.shape[-1], qmin, qmax).to(x.dtype), scale, zero


# --------------------------------------------------------------------------------------------------- rotations of blocks


def rotate_blocks(x: Tensor, matrices: Tensor, permutation: Tensor, transpose: bool) -> Tensor:
    """Channels permuted, then each block multiplied by its matrix, or the transposed matrices and every channel put back."""
    wide = _wide(x)
    if transpose:
        blocks = wide.reshape(*x.shape[:-1], len(matrices), -1)
        y = torch.einsum("kij,...ki->...kj", matrices, blocks).reshape(x.shape)
        return (y[..., permutation.argsort()] if permutation.numel() else y).to(x.dtype)
    moved = (wide[..., permutation] if permutation.numel() else wide).reshape(*x.shape[:-1], len(matrices), -1)
    return torch.einsum("kij,...kj->...ki", matrices, moved).reshape(x.shape).to(x.dtype)


# ---------------------------------------------------------------------------------------- norms and moments of weights


def lp_norm_query_key(
    weight: Tensor, angle: Tensor, log_scale: Tensor, group: int, inverse: bool, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum |w'|^p as float64, its gradients for angle and log_scale), w' = merge_query_key(weight)."""
    y = _merge_query_key_wide(weight, angle, log_scale, group, inverse).double()
    power = y.abs().pow(p)
    slope = p * y.abs().pow(p - 1) * y.sign()
    dangle = _sum_pairs(slope[:, 1] * y[:, 0] - slope[:, 0] * y[:, 1], angle, group)
    dlog_scale = _sum_pairs(p * power.sum(dim=1), angle, group)
    return power.sum(), dangle, -dlog_scale if inverse else dlog_scale


def lp_norm_scale(weight: Tensor, row_log_scale: Tensor, column_log_scale: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """(sum |w'|^p as float64, its gradients for the log scales), w' = merge_scale(weight)."""
    power = _merge_scale_wide(weight, row_log_scale, column_log_scale).double().abs().pow(p)
    dtype = compute_dtype(weight)
    drow = (p * power.sum(dim=1)).to(dtype) if row_log_scale.numel() else None
    dcolumn = (p * power.sum(dim=0)).to(dtype) if column_log_scale.numel() else None
    return power.sum(), _or_absent(drow, row_log_scale), _or_absent(dcolumn, column_log_scale)


def query_key_moments(weight: Tensor, head_dim: int) -> Tensor:
    """[heads, half, 5]: sums over the columns of a^4, a^3 b, a^2 b^2, a b^3, b^4 for each RoPE pair of rows (a, b)."""
    pairs = weight.double().reshape(-1, 2, head_dim // 2, weight.shape[1])
    a, b = pairs[:, 0], pairs[:, 1]
    products = (a * a * a * a, a * a * a * b, a * a * b * b, a * b * b * b, b * b * b * b)
    return torch.stack([t.sum(dim=-1) for t in products], dim=-1)


def scale_moments(weight: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The sums of |w|^p over each row [R] and over each column [C], in float64."""
    power = weight.double().abs().pow(p)
    return power.sum(dim=1), power.sum(dim=0)


SOLVE_GRID = 256
SOLVE_HALVINGS = 60


def _fourth_power_series(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c0, c1, c2) of f(phi) = c0 + c1 cos 4 phi + c2 sin 4 phi, the sum of fourth powers after a rotation by phi."""
    m0, m1, m2, m3, m4 = moments.double().unbind(-1)
    return 0.75 * (m0 + 2 * m2 + m4), 0.25 * (m0 - 6 * m2 + m4), m3 - m1


def solve_query_key(key_moments: Tensor, query_moments: Tensor) -> tuple[Tensor, Tensor]:
    """(angle in [0, pi/2), log_scale) of least s^4 f_k(angle) + s^-4 f_q(angle); (0, 0) where either is all zero."""
    series = [_fourth_power_series(m) for m in (key_moments, query_moments)]
    valid = (series[0][0] > 0) & (series[1][0] > 0)
    safe = [(torch.where(valid, c0, 1.0), c1, c2) for c0, c1, c2 in series]

    def objective(u: Tensor) -> Tensor:
        return sum((torch.log(c0 + c1 * u.cos() + c2 * u.sin()) for c0, c1, c2 in safe), torch.zeros_like(u))

    def slope(u: Tensor) -> Tensor:
        parts = [(c2 * u.cos() - c1 * u.sin()) / (c0 + c1 * u.cos() + c2 * u.sin()) for c0, c1, c2 in safe]
        return parts[0] + parts[1]

    step = 2 * torch.pi / SOLVE_GRID
    values = torch.stack([objective(torch.full_like(safe[0][0], k * step)) for k in range(SOLVE_GRID)])
    best = values.argmin(dim=0).double() * step
    low, high = best - step, best + step
    for _ in range(SOLVE_HALVINGS):
        middle = 0.5 * (low + high)
        rising = slope(middle) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    u = torch.remainder(0.5 * (low + high), 2 * torch.pi)
    f_key, f_query = (c0 + c1 * u.cos() + c2 * u.sin() for c0, c1, c2 in safe)
    return torch.where(valid, u / 4, 0.0), torch.where(valid, (f_query.log() - f_key.log()) / 8, 0.0)


# ----------------------------------------------------------------------------------------------- residual scaling (S_n)


def _root_mean_square(residual: Tensor, running_scale: Tensor, eps: float) -> Tensor:
    return (residual.double().square().mean(dim=-1, keepdim=True) + eps / running_scale.double().square()).sqrt()


def residual_scale(residual: Tensor, running_scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual / m, running_scale * m), m = sqrt(mean(residual^2) + eps / running_scale^2)."""
    m = _root_mean_square(residual, running_scale, eps).to(running_scale.dtype)
    return (_wide(residual) / m).to(residual.dtype), running_scale * m


def residual_scale_backward(
    dnormalized: Tensor, dnew_running_scale: Tensor, residual: Tensor, running_scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(dresidual, drunning_scale): dm = dnew * running_scale - sum(dnormalized * residual) / m^2."""
    sigma, dnew, wide_dy = running_scale.double(), dnew_running_scale.double(), dnormalized.double()
    m = _root_mean_square(residual, running_scale, eps)
    r = residual.double()
    dm = dnew * sigma - (wide_dy * r).sum(dim=-1, keepdim=True) / (m * m)
    dresidual = wide_dy / m + r * (dm / (m * residual.shape[-1]))
    dsigma = dnew * m - dm * eps / (m * sigma * sigma * sigma)
    return dresidual.to(residual.dtype), dsigma.to(running_scale.dtype)


# ------------------------------------------------------------------------------------------------------------- packing


def pack_int4(q: Tensor, signed: bool) -> Tensor:
    """Two columns per byte, the even column in the low nibble; an odd last column has a zero neighbor."""
    low, high = (-8, 7) if signed else (0, 15)
    if q.numel() and (int(q.min()) < low or int(q.max()) > high):
        raise RuntimeError(f"pack_int4: a value lies outside {low}..{high}")
    nibbles = torch.nn.functional.pad(q & 15, (0, q.shape[1] % 2)).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int, signed: bool) -> Tensor:
    """The inverse of pack_int4: int8 [R, columns]."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(packed.shape[0], 2 * packed.shape[1])[:, :columns]
    nibbles = nibbles.to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles) if signed else nibbles.clone()
