"""residual_scale: reference, gradient, opcheck, edge cases, instruction sets, errors."""

from __future__ import annotations

import math

import pytest
import torch

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from tests.ops.common import DTYPES, LENGTHS, assert_no_growth, assert_same_on_every_isa, assert_within, random
from tests.tolerances import UNIT, compute_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype) -> None:
    wide = compute_dtype(dtype)
    residual = random(2, 5, 37, dtype=dtype)
    running = random(2, 5, 1, dtype=wide, seed=1).exp()
    dnormalized, dnew = random(2, 5, 37, dtype=dtype, seed=2), random(2, 5, 1, dtype=wide, seed=3)
    expected = reference.residual_scale(residual, running, 0.1)
    gradients = reference.residual_scale_backward(dnormalized, dnew, residual, running, 0.1)
    leaves = [residual.clone().requires_grad_(), running.clone().requires_grad_()]
    actual = ops.residual_scale(*leaves, eps=0.1)
    torch.autograd.backward(actual, (dnormalized, dnew))
    for mine, theirs, storage in zip(actual, expected, (dtype, wide), strict=True):
        assert_within("residual_scale", mine, theirs, storage)
    for leaf, gradient, storage in zip(leaves, gradients, (dtype, wide), strict=True):
        assert_within("residual_scale_backward", leaf.grad, gradient, storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_rms_norm_of_the_true_residual(dtype: torch.dtype) -> None:
    """The error must shrink with the dtype: epsilon divided by the squared scale makes S_n exact."""
    true = random(7, 64, dtype=dtype) * 30
    running = random(7, 1, dtype=dtype, seed=1).exp()
    normalized, new = ops.residual_scale(true / running, running, eps=1e-2)
    torch.testing.assert_close(normalized, torch.nn.functional.rms_norm(true, (64,), eps=1e-2), rtol=8 * UNIT[dtype], atol=0)
    torch.testing.assert_close(normalized * new, true, rtol=8 * UNIT[dtype], atol=0)


def test_gradient() -> None:
    residual, running = random(3, 5).requires_grad_(), (random(3, 1, seed=1).abs() + 0.5).requires_grad_()
    for eps in (0.0, 0.3):
        assert torch.autograd.gradcheck(lambda r, s, e=eps: ops.residual_scale(r, s, eps=e), (residual, running))


def test_opcheck() -> None:
    residual, running = random(3, 6, dtype=torch.float32), random(3, 1, dtype=torch.float32, seed=1).exp()
    torch.library.opcheck(torch.ops.fptquant.residual_scale.default, (residual.requires_grad_(), running.requires_grad_(), 1e-3))
    plain = (residual.detach(), running.detach())
    torch.library.opcheck(torch.ops.fptquant.residual_scale_backward.default, (*plain, *plain, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_and_instruction_set_bit_for_bit(dtype: torch.dtype) -> None:
    wide = compute_dtype(dtype)
    for hidden in LENGTHS:
        residual, dn = random(9, hidden, dtype=dtype), random(9, hidden, dtype=dtype, seed=2)
        residual[3, hidden // 2], residual[4, hidden // 2] = math.nan, math.inf
        running, dnew = random(9, 1, dtype=wide, seed=1).exp(), random(9, 1, dtype=wide, seed=3)
        assert_same_on_every_isa(
            lambda r=residual, s=running, dn=dn, dnew=dnew: (
                *torch.ops.fptquant.residual_scale(r, s, 1e-5),
                *torch.ops.fptquant.residual_scale_backward(dn, dnew, r, s, 1e-5),
            )
        )


def test_edges() -> None:
    normalized, new = ops.residual_scale(torch.empty(0, 4), torch.empty(0, 1), eps=1e-5)
    assert normalized.shape == (0, 4)
    assert new.shape == (0, 1)
    normalized, new = ops.residual_scale(torch.zeros(1, 4), torch.ones(1, 1), eps=1e-4)
    assert torch.equal(normalized, torch.zeros(1, 4))
    assert new.item() == pytest.approx(1e-2)
    normalized, _ = ops.residual_scale(torch.tensor([[1e-30, -1e-30], [1e30, 1e30]]), torch.ones(2, 1), eps=0.0)
    torch.testing.assert_close(normalized, torch.tensor([[1.0, -1.0], [1.0, 1.0]]))  # squares beyond float32
    normalized, new = ops.residual_scale(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 1), eps=0.0)
    assert normalized.isnan().all()
    assert new.isnan()


def test_errors() -> None:
    with pytest.raises(UserError, match=r"needs a running_scale of shape \[3, 1\], not \[3\]"):
        ops.residual_scale(torch.ones(3, 4), torch.ones(3), eps=1e-5)
    with pytest.raises(UserError, match=r"eps = -1\.0 must not be negative"):
        ops.residual_scale(torch.ones(3, 4), torch.ones(3, 1), eps=-1.0)
    with pytest.raises(RuntimeError, match=r"running_scale\[1\] = 0 must be positive"):
        ops.residual_scale(torch.ones(2, 4), torch.tensor([[1.0], [0.0]]), eps=1e-5)


def test_a_failing_call_leaks_nothing() -> None:
    residual, running = torch.zeros(1024, 1024), torch.zeros(1024, 1)
    assert_no_growth(lambda: torch.ops.fptquant.residual_scale(residual, running, 1e-5), "must be positive")
