"""Two 4-bit integers per byte."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference

_library.define("pack_int4(Tensor q, bool signed) -> Tensor")
_library.define("unpack_int4(Tensor packed, int columns, bool signed) -> Tensor")
_library.fallback("pack_int4", reference.pack_int4)
_library.fallback("unpack_int4", reference.unpack_int4)
_library.fake("pack_int4", lambda q, signed: q.new_empty((q.shape[0], (q.shape[1] + 1) // 2), dtype=torch.uint8))
_library.fake("unpack_int4", lambda packed, columns, signed: packed.new_empty((packed.shape[0], columns), dtype=torch.int8))
_pack_int4 = _library.operator("pack_int4")
_unpack_int4 = _library.operator("unpack_int4")


def pack_int4(q: Tensor, *, signed: bool = True) -> Tensor:
    """Packs pairs of neighbors along the last axis: byte[r, c] = q[r, 2c] + 16 q[r, 2c + 1] (nibbles).

    Shape:
        q: [R, C] int8, values -8..7 (two's complement nibbles), or 0..15 if not ``signed``.
        returns: [R, ceil(C / 2)] uint8; a missing odd column is 0.

    Raises:
        UserError: if q is not an int8 matrix.
        RuntimeError: if a value lies outside the range.

    >>> pack_int4(torch.tensor([[1, 2, -1]], dtype=torch.int8))
    tensor([[33, 15]], dtype=torch.uint8)
    """
    if q.dim() != 2 or q.dtype != torch.int8:
        raise UserError(f"pack_int4: q is {q.dtype} of shape {list(q.shape)}; it must be an int8 matrix")
    packed: Tensor = _pack_int4(q.contiguous(), signed)
    return packed


def unpack_int4(packed: Tensor, columns: int, *, signed: bool = True) -> Tensor:
    """The inverse of ``pack_int4``.

    Shape:
        packed: [R, ceil(columns / 2)] uint8. Returns: [R, columns] int8, values -8..7, or 0..15 if not ``signed``.

    Raises:
        UserError: if packed is not a uint8 matrix of that width.

    >>> unpack_int4(torch.tensor([[33, 15]], dtype=torch.uint8), 3)
    tensor([[ 1,  2, -1]], dtype=torch.int8)
    """
    if packed.dim() != 2 or packed.dtype != torch.uint8 or columns < 0 or packed.shape[1] != (columns + 1) // 2:
        raise UserError(
            f"unpack_int4: packed is {packed.dtype} of shape {list(packed.shape)}; {columns} columns need a uint8 "
            f"matrix of {(columns + 1) // 2} columns"
        )
    q: Tensor = _unpack_int4(packed.contiguous(), columns, signed)
    return q
