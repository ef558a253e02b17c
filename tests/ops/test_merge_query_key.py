"""merge_query_key and its moments: reference, gradient, opcheck, edge cases, instruction sets, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor, PerToken, channel_layout
from tests.ops.common import DTYPES, LENGTHS, assert_no_growth, assert_same_on_every_isa, assert_within, random
from tests.tolerances import MOMENTS, compute_dtype

KV_HEADS, GROUP, HALF = 3, 2, 4
ROWS = KV_HEADS * GROUP * 2 * HALF
GRANULARITIES = [PerChannel(0), PerToken(), PerGroup(8)]


def parameters(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(dtype)
    return random(KV_HEADS, HALF, dtype=wide, seed=1), (random(KV_HEADS, HALF, seed=2) * 0.3).to(wide)


def quantizer(granularity: Granularity, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = channel_layout(granularity, (ROWS, columns)).scale_shape
    scale = random(*shape, seed=3).abs() * 0.1 + 0.15
    return scale.to(compute_dtype(dtype)), (random(*shape, seed=4) * 2).round().to(compute_dtype(dtype))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, inverse: bool) -> None:
    weight, (angle, log_scale) = random(ROWS, 33, dtype=dtype), parameters(dtype)
    dy = random(ROWS, 33, dtype=dtype, seed=5)
    expected = reference.merge_query_key(weight, angle, log_scale, GROUP, inverse)
    gradients = reference.merge_query_key_backward(dy, weight, angle, log_scale, GROUP, inverse, True)
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, angle, log_scale)]
    actual = ops.merge_query_key(*leaves, group=GROUP, inverse=inverse)
    actual.backward(dy)
    assert_within("merge_query_key", actual, expected, dtype)
    assert_within("merge_query_key_backward", leaves[0].grad, gradients[0], dtype)
    for leaf, gradient in zip(leaves[1:], gradients[1:], strict=True):
        assert_within("merge_query_key_parameters", leaf.grad, gradient, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_equals_reference(dtype: torch.dtype, granularity: Granularity, symmetric: bool) -> None:
    weight, (angle, log_scale) = random(ROWS, 40, dtype=dtype), parameters(dtype)
    scale, zero = quantizer(granularity, 40, dtype)
    zero = torch.empty(0, dtype=scale.dtype) if symmetric else zero
    inner = channel_layout(granularity, weight.shape).inner
    grid = IntegerGrid(4)
    dy = random(ROWS, 40, dtype=dtype, seed=5)
    tensors, options = (weight, angle, log_scale, scale, zero), (GROUP, True, inner, grid.kind, grid.qmin, grid.qmax)
    expected = reference.merge_query_key_fake_quant(*tensors, *options)
    gradients = reference.merge_query_key_fake_quant_backward(dy, *tensors, *options, True)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[: 4 if symmetric else 5]]
    actual = ops.merge_query_key_fake_quant(*leaves, group=GROUP, inverse=True, grid=grid, granularity=granularity)
    actual.backward(dy)
    assert_within("merge_query_key", actual, expected, dtype)
    assert_within("merge_query_key_backward", leaves[0].grad, gradients[0], dtype)
    for leaf, gradient in zip(leaves[1:], gradients[1:], strict=False):
        assert_within("merge_query_key_parameters", leaf.grad, gradient, dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_fused_is_the_two_operators_in_turn(granularity: Granularity) -> None:
    """Bit for bit in float32, gradients of the quantizer's scale and of the weight included."""
    weight, (angle, log_scale) = random(ROWS, 40, dtype=torch.float32), parameters(torch.float32)
    scale, zero = quantizer(granularity, 40, torch.float32)
    results = []
    for fused in (True, False):
        w, s, z = (tensor.clone().requires_grad_() for tensor in (weight, scale, zero))
        options = {"grid": IntegerGrid(4), "granularity": granularity}
        if fused:
            y = ops.merge_query_key_fake_quant(w, angle, log_scale, s, z, group=GROUP, **options)
        else:
            y = ops.fake_quant(ops.merge_query_key(w, angle, log_scale, group=GROUP), s, z, **options)
        y.backward(random(ROWS, 40, dtype=torch.float32, seed=5))
        results.append((y, w.grad, s.grad, z.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_scores_are_unchanged() -> None:
    """Key rows with s, query rows with 1 / s: the products of every RoPE pair, and so every score, stay what they were."""
    key, query = random(2 * 8, 16, seed=1), random(4 * 8, 16, seed=2)
    angle, log_scale = random(2, 4, seed=3), random(2, 4, seed=4)
    new_key = ops.merge_query_key(key, angle, log_scale)
    new_query = ops.merge_query_key(query, angle, log_scale, group=2, inverse=True)
    x = random(5, 16, seed=5)
    position = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64)

    def rope(rows: Tensor) -> Tensor:
        a, b = rows[..., :4], rows[..., 4:]
        cosine, sine = position.cos()[:, None], position.sin()[:, None]
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)

    def scores(key: Tensor, query: Tensor) -> Tensor:
        k, q = rope((x @ key.t()).reshape(5, 2, 8)), rope((x @ query.t()).reshape(5, 4, 8))
        return torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, dim=1))

    torch.testing.assert_close(scores(new_key, new_query), scores(key, query), rtol=1e-11, atol=1e-11)


def test_gradient() -> None:
    weight, (angle, log_scale) = random(ROWS, 3).requires_grad_(), parameters(torch.float64)
    leaves = (weight, angle.requires_grad_(), log_scale.requires_grad_())
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda w, a, s, i=inverse: ops.merge_query_key(w, a, s, group=GROUP, inverse=i), leaves)
    bias = random(ROWS).requires_grad_()
    assert torch.autograd.gradcheck(lambda b, a, s: ops.merge_query_key(b, a, s, group=GROUP), (bias, *leaves[1:]))


def test_opcheck() -> None:
    weight, (angle, log_scale) = random(ROWS, 8, dtype=torch.float32), parameters(torch.float32)
    scale, zero = quantizer(PerGroup(4), 8, torch.float32)
    leaves = tuple(tensor.requires_grad_() for tensor in (weight, angle, log_scale))
    torch.library.opcheck(torch.ops.fptquant.merge_query_key.default, (*leaves, GROUP, True))
    arguments = (*leaves, scale.requires_grad_(), zero.requires_grad_(), GROUP, False, 4, 0, -8, 7)
    torch.library.opcheck(torch.ops.fptquant.merge_query_key_fake_quant.default, arguments)
    plain = tuple(tensor.detach() for tensor in arguments[:5])
    for wanted in (False, True):  # the gradient of the weight
        options = (plain[0], *plain[:3], GROUP, True, wanted)
        torch.library.opcheck(torch.ops.fptquant.merge_query_key_backward.default, options)
        options = (plain[0], *plain, GROUP, False, 4, 0, -8, 7, wanted)
        torch.library.opcheck(torch.ops.fptquant.merge_query_key_fake_quant_backward.default, options)
    torch.library.opcheck(torch.ops.fptquant.query_key_moments.default, (weight.detach(), 2 * HALF))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_and_instruction_set_bit_for_bit(dtype: torch.dtype) -> None:
    angle, log_scale = parameters(dtype)
    for columns in LENGTHS:
        weight, dy = random(ROWS, columns, dtype=dtype), random(ROWS, columns, dtype=dtype, seed=5)
        if columns > 5:
            weight[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-8])
        scale, zero = quantizer(PerChannel(0), columns, dtype)
        plain, quantized = (angle, log_scale, GROUP, True), (angle, log_scale, scale, zero, GROUP, True, columns, 0, -8, 7)

        def call(
            weight: Tensor = weight, dy: Tensor = dy, plain: tuple = plain, quantized: tuple = quantized
        ) -> tuple[Tensor, ...]:
            return (
                torch.ops.fptquant.merge_query_key(weight, *plain),
                *torch.ops.fptquant.merge_query_key_backward(dy, weight, *plain, True),
                torch.ops.fptquant.merge_query_key_fake_quant(weight, *quantized),
                *torch.ops.fptquant.merge_query_key_fake_quant_backward(dy, weight, *quantized, True),
                torch.ops.fptquant.query_key_moments(weight, 2 * HALF),
            )

        assert_same_on_every_isa(call)


def test_edges() -> None:
    angle, log_scale = parameters(torch.float32)
    assert ops.merge_query_key(torch.empty(ROWS, 0), angle, log_scale, group=GROUP).shape == (ROWS, 0)
    weight = torch.zeros(ROWS, 4)
    weight[0, 0], weight[1, 1] = math.nan, math.inf
    y = ops.merge_query_key(weight, angle, log_scale, group=GROUP)
    assert y[0, 0].isnan()
    assert y[HALF, 0].isnan()
    assert y[1, 1].isinf()
    assert y.nan_to_num(0, 0, 0).count_nonzero() == 0
    transposed = random(5, ROWS, dtype=torch.float32).t()
    assert torch.equal(
        ops.merge_query_key(transposed, angle, log_scale, group=GROUP),
        ops.merge_query_key(transposed.contiguous(), angle, log_scale, group=GROUP),
    )


def test_frozen_weight_costs_no_gradient() -> None:
    weight, (angle, log_scale) = random(ROWS, 8, dtype=torch.float32), parameters(torch.float32)
    dweight, *_ = torch.ops.fptquant.merge_query_key_backward(weight, weight, angle, log_scale, GROUP, False, False)
    assert dweight.numel() == 0
    ops.merge_query_key(weight, angle.requires_grad_(), log_scale, group=GROUP).sum().backward()
    assert angle.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_equal_reference(dtype: torch.dtype) -> None:
    weight = random(ROWS, 100, dtype=dtype)
    actual = ops.query_key_moments(weight, head_dim=2 * HALF)
    torch.testing.assert_close(actual, reference.query_key_moments(weight, 2 * HALF), rtol=MOMENTS, atol=100 * MOMENTS)


def test_errors_name_both_shapes() -> None:
    angle, log_scale = parameters(torch.float32)
    weight = torch.zeros(ROWS, 8)
    with pytest.raises(UserError, match=r"weight has shape \[5, 8\].* need 48 rows"):
        ops.merge_query_key(torch.zeros(5, 8), angle, log_scale, group=GROUP)
    with pytest.raises(UserError, match=r"angle \[3, 4\] and log_scale \[2, 4\]"):
        ops.merge_query_key(weight, angle, log_scale[:2], group=GROUP)
    with pytest.raises(UserError, match=r"scale has shape \[7\].*needs \[48\]"):
        ops.merge_query_key_fake_quant(weight, angle, log_scale, torch.ones(7), group=GROUP, grid=IntegerGrid(4))
    for granularity in (PerTensor(), PerChannel(1)):
        with pytest.raises(UserError, match="merge first, then fake_quant"):
            ops.merge_query_key_fake_quant(
                weight, angle, log_scale, torch.ones(1), group=GROUP, grid=IntegerGrid(4), granularity=granularity
            )
    with pytest.raises(UserError, match="cannot be cut into heads of head_dim = 7"):
        ops.query_key_moments(weight, head_dim=7)
    with pytest.raises(RuntimeError, match="one row for each of kv_heads"):
        torch.ops.fptquant.merge_query_key(weight, angle, log_scale, 1, False)
    with pytest.raises(RuntimeError, match=r"scale\[0\] = 0 must be positive"):
        ops.merge_query_key_fake_quant(weight, angle, log_scale, torch.zeros(ROWS), group=GROUP, grid=IntegerGrid(4))


def test_a_failing_call_leaks_nothing() -> None:
    weight, angle = torch.zeros(1024, 1024), torch.zeros(8, 64)
    bad = torch.zeros(1024)
    arguments = (weight, angle, angle, bad, torch.empty(0), 1, False, 1024, 0, -8, 7)
    assert_no_growth(lambda: torch.ops.fptquant.merge_query_key_fake_quant(*arguments), "must be positive")
    assert_no_growth(lambda: torch.ops.fptquant.merge_query_key_fake_quant_backward(weight, *arguments, True), "must be positive")
