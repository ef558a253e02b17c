"""The Hadamard matrices that sizes are made of: how the C core (csrc/ops/hadamard_matrix.c) constructs and verifies them."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from fptquant._core import library
from fptquant.errors import UserError

_MAX_FACTORS = 16


class _Plan(ctypes.Structure):
    """struct fptq_hadamard_plan."""

    _fields_ = (
        ("num_factors", ctypes.c_int64),
        ("power", ctypes.c_int64),
        ("order", ctypes.c_int64 * _MAX_FACTORS),
        ("matrix", ctypes.POINTER(ctypes.c_int8) * _MAX_FACTORS),
    )


@cache
def _factors(size: int) -> tuple[tuple[Tensor, ...], int]:
    """(+-1 matrices of the dense factors, k): H_size is their Kronecker product with H_2^k, the last index fastest.

    Raises:
        UserError: if no Hadamard matrix of this size can be constructed; names the nearest possible sizes.
    """
    plan, core = _Plan(), library()
    if core.fptq_hadamard_plan_of(ctypes.c_int64(size), ctypes.byref(plan)):
        raise UserError(core.fptq_last_error().decode())
    matrices = []
    for order, pointer in zip(plan.order[: plan.num_factors], plan.matrix, strict=False):
        values = ctypes.string_at(pointer, order * order)
        matrices.append(torch.frombuffer(bytearray(values), dtype=torch.int8).reshape(order, order))
    return tuple(matrices), int(plan.power)


def hadamard_factors(size: int) -> list[Tensor]:
    """The +-1 matrices (int8) whose Kronecker product is the Hadamard matrix of this size, the last index fastest.

    Raises:
        UserError: if no Hadamard matrix of this size can be constructed; names the nearest possible sizes.
    """
    dense, power = _factors(size)
    return [*dense, *[torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)] * power]


def sizes_up_to(limit: int) -> list[int]:
    """All sizes up to ``limit`` of which a Hadamard matrix can be constructed."""
    exists = library().fptq_hadamard_exists
    exists.restype, exists.argtypes = ctypes.c_bool, [ctypes.c_int64]
    return [size for size in range(1, limit + 1) if exists(size)]
