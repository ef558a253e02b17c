"""merge_value: reference, gradient, function preservation, edge cases, errors."""

from __future__ import annotations

import pytest
import torch

from fptquant import ops
from fptquant.errors import UserError
from tests.ops.common import DTYPES, assert_within, random
from tests.tolerances import UNIT, compute_dtype


def matrices(heads: int, size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Well-conditioned, not orthogonal, not symmetric."""
    return (torch.eye(size, dtype=torch.float64) + random(heads, size, size, seed=1) * 0.3 / size**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype) -> None:
    matrix = matrices(2, 4, compute_dtype(dtype))
    value, output = random(8, 7, dtype=dtype), random(7, 16, dtype=dtype)
    expected = torch.einsum("hij,hjc->hic", matrix.double(), value.double().reshape(2, 4, 7)).reshape(8, 7).to(dtype)
    assert_within("merge_value", ops.merge_value(value, matrix), expected, dtype)
    inverses = torch.linalg.inv(matrix.double()).repeat_interleave(2, dim=0)
    expected = torch.einsum("rhi,hij->rhj", output.double().reshape(7, 4, 4), inverses).reshape(7, 16).to(dtype)
    assert_within("merge_value", ops.merge_value(output, matrix, group=2, inverse=True), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_output_of_values_is_unchanged(dtype: torch.dtype) -> None:
    """o_proj(v_proj x) with grouped heads and a value bias; the error must shrink with the dtype."""
    heads, group, size, hidden = 2, 3, 16, 24
    matrix = matrices(heads, size, dtype)
    value, bias = random(heads * size, hidden, dtype=dtype), random(heads * size, dtype=dtype, seed=2)
    output = random(hidden, heads * group * size, dtype=dtype, seed=3)
    x = random(5, hidden, dtype=dtype, seed=4)

    def block(value: torch.Tensor, bias: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        v = (x @ value.t() + bias).reshape(5, heads, 1, size).expand(-1, -1, group, -1).reshape(5, -1)
        return v @ output.t()

    before = block(value, bias, output)
    after = block(
        ops.merge_value(value, matrix), ops.merge_value(bias, matrix), ops.merge_value(output, matrix, group=group, inverse=True)
    )
    assert (after - before).abs().max() < 200 * UNIT[dtype] * before.abs().max()


def test_gradient() -> None:
    matrix = matrices(2, 3).requires_grad_()
    value, output = random(6, 4).requires_grad_(), random(4, 12, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, m: ops.merge_value(w, m), (value, matrix))
    assert torch.autograd.gradcheck(lambda w, m: ops.merge_value(w, m, group=2, inverse=True), (output, matrix))
    assert torch.autograd.gradcheck(lambda b, m: ops.merge_value(b, m), (random(6).requires_grad_(), matrix))


def test_edges_and_errors() -> None:
    matrix = matrices(2, 4)
    assert ops.merge_value(torch.empty(8, 0, dtype=torch.float64), matrix).shape == (8, 0)
    assert ops.merge_value(torch.empty(0, 8, dtype=torch.float64), matrix, inverse=True).shape == (0, 8)
    with pytest.raises(UserError, match=r"matrix has shape \[4, 4\]"):
        ops.merge_value(torch.zeros(4, 4), matrix[0])
    with pytest.raises(UserError, match=r"weight has shape \[7, 4\].*needs 8 rows"):
        ops.merge_value(torch.zeros(7, 4), matrix)
    with pytest.raises(UserError, match=r"weight has shape \[8, 4\].*group = 3 needs 24 columns"):
        ops.merge_value(torch.zeros(8, 4), matrix, group=3, inverse=True)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        ops.merge_value(torch.zeros(3, 8), torch.zeros(2, 4, 4), inverse=True)
