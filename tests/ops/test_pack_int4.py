"""pack_int4, unpack_int4: values, reference, opcheck, edge cases, instruction sets, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fptquant.numpy as fnp
from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from tests.ops.common import LENGTHS, assert_no_growth, assert_same_on_every_isa


def integers(rows: int, columns: int, signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    low, high = (-8, 8) if signed else (0, 16)
    return torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)


def test_layout() -> None:
    """The even column is the low nibble; every value has its two's complement nibble; an odd last column stands alone."""
    q = torch.arange(-8, 8, dtype=torch.int8)[None]
    packed = ops.pack_int4(q)
    assert packed[0].tolist() == [(2 * c - 8) % 16 | ((2 * c - 7) % 16) << 4 for c in range(8)]
    assert ops.pack_int4(torch.tensor([[-1]], dtype=torch.int8)).tolist() == [[15]]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("columns", [0, *LENGTHS])
def test_equals_reference_and_comes_back_on_every_instruction_set(columns: int, signed: bool) -> None:
    for rows in (0, 1, 5):
        q = integers(rows, columns, signed)
        packed = ops.pack_int4(q, signed=signed)
        assert packed.dtype == torch.uint8
        assert torch.equal(packed, reference.pack_int4(q, signed))
        assert torch.equal(ops.unpack_int4(packed, columns, signed=signed), q)
        assert torch.equal(reference.unpack_int4(packed, columns, signed), q)
        assert_same_on_every_isa(
            lambda q=q, packed=packed: (ops.pack_int4(q, signed=signed), ops.unpack_int4(packed, columns, signed=signed))
        )


def test_opcheck() -> None:
    q = integers(3, 5, True)
    torch.library.opcheck(torch.ops.fptquant.pack_int4.default, (q, True))
    torch.library.opcheck(torch.ops.fptquant.unpack_int4.default, (ops.pack_int4(q), 5, True))


@pytest.mark.parametrize("signed", [True, False])
def test_numpy_twin(signed: bool) -> None:
    q = integers(3, 5, signed)
    packed = fnp.pack_int4(q.numpy(), signed=signed)
    assert np.array_equal(packed, ops.pack_int4(q, signed=signed).numpy())
    assert np.array_equal(fnp.unpack_int4(packed, 5, signed=signed), q.numpy())
    assert np.array_equal(fnp.pack_int4(q.numpy().T, signed=signed), ops.pack_int4(q.t(), signed=signed).numpy())
    with pytest.raises(UserError, match="a value lies outside"):
        fnp.pack_int4(np.full((2, 3), 99, np.int8), signed=signed)
    with pytest.raises(UserError, match="must be an int8 matrix"):
        fnp.pack_int4(np.zeros((2, 3)), signed=signed)
    with pytest.raises(UserError, match="need a uint8 matrix of 4"):
        fnp.unpack_int4(packed, 7, signed=signed)


def test_not_contiguous_is_made_so() -> None:
    q = integers(6, 4, True)
    assert torch.equal(ops.pack_int4(q.t()), ops.pack_int4(q.t().contiguous()))


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 4)])
@pytest.mark.parametrize(("signed", "value"), [(True, 8), (True, -9), (True, 127), (False, -1), (False, 16), (False, -128)])
def test_values_that_do_not_fit_are_refused(signed: bool, value: int, place: tuple[int, int]) -> None:
    q = torch.zeros(2, 5, dtype=torch.int8)
    q[place] = value
    for pack in (torch.ops.fptquant.pack_int4, reference.pack_int4):
        with pytest.raises(RuntimeError, match="a value lies outside"):
            pack(q, signed)


def test_errors() -> None:
    with pytest.raises(UserError, match=r"q is torch.float32 of shape \[2, 2\]"):
        ops.pack_int4(torch.zeros(2, 2))
    with pytest.raises(UserError, match=r"packed is torch.uint8 of shape \[2, 2\]; 5 columns need a uint8 matrix of 3"):
        ops.unpack_int4(torch.zeros(2, 2, dtype=torch.uint8), 5)
    with pytest.raises(RuntimeError, match="columns = 5"):
        torch.ops.fptquant.unpack_int4(torch.zeros(2, 2, dtype=torch.uint8), 5, True)


def test_a_failing_call_leaks_nothing() -> None:
    large = torch.full((2048, 4096), 99, dtype=torch.int8)
    assert_no_growth(lambda: torch.ops.fptquant.pack_int4(large, True), "a value lies outside", calls=100)
