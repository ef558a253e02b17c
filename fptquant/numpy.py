"""NumPy twins of the operators that make sense without PyTorch: the same C functions on NumPy arrays.

Each mirrors the operator of the same name in ``fptquant.ops``, formula and rounding included, without gradients. This module
does not import torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptquant._core import library
from fptquant.errors import UserError
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerTensor, channel_layout
from fptquant.quantizers.range_method import HISTOGRAM_BINS, RULES, RangeMethod

Array = NDArray[Any]
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.float16): 3}
_POINTER, _INT64, _INT32, _DOUBLE, _BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_bool


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    """The ctypes twin of an argument struct of csrc/fptq.h; fields in the same order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


_Grid = _struct("_Grid", ("kind", _INT32), ("qmin", _INT32), ("qmax", _INT32))
_LAYOUT = (("outer", _INT64), ("channels", _INT64), ("inner", _INT64))
_FakeQuantForward = _struct(
    "_FakeQuantForward",
    *((name, _POINTER) for name in ("y", "x", "scale", "zero_point")),
    *_LAYOUT,
    ("grid", _Grid),
    ("dtype", _INT32),
)
_RangeMinmax = _struct(
    "_RangeMinmax", *((name, _POINTER) for name in ("lo", "hi", "x")), *_LAYOUT, ("dtype", _INT32), ("partials", _POINTER)
)
_RangeErrors = _struct(
    "_RangeErrors",
    *((name, _POINTER) for name in ("errors", "x", "lo", "hi", "ratios")),
    *_LAYOUT,
    ("candidates", _INT64),
    ("grid", _Grid),
    ("symmetric", _BOOL),
    ("p", _DOUBLE),
    ("dtype", _INT32),
    ("partials", _POINTER),
)
_RangeHistogram = _struct(
    "_RangeHistogram",
    *((name, _POINTER) for name in ("counts", "x", "lo", "hi")),
    *_LAYOUT,
    ("bins", _INT64),
    ("dtype", _INT32),
)
_SetRange = _struct(
    "_SetRange",
    *((name, _POINTER) for name in ("scale", "zero_point", "lo", "hi", "evidence", "ratios")),
    ("channels", _INT64),
    ("n", _INT64),
    ("rule", _INT32),
    ("grid", _Grid),
    ("symmetric", _BOOL),
    ("percentile", _DOUBLE),
    ("dtype", _INT32),
)

_Hadamard = _struct(
    "_Hadamard",
    ("y", _POINTER),
    ("x", _POINTER),
    ("blocks", _INT64),
    ("size", _INT64),
    ("transpose", _BOOL),
    ("dtype", _INT32),
    ("plan", _POINTER),
    ("out_of_memory", _POINTER),
)
_PackInt4 = _struct(
    "_PackInt4",
    ("packed", _POINTER),
    ("q", _POINTER),
    ("rows", _INT64),
    ("columns", _INT64),
    ("is_signed", _BOOL),
    ("out_of_range", _POINTER),
)
_UnpackInt4 = _struct(
    "_UnpackInt4",
    ("q", _POINTER),
    ("packed", _POINTER),
    ("rows", _INT64),
    ("columns", _INT64),
    ("is_signed", _BOOL),
)


def _call(function: str, struct: type[ctypes.Structure], **fields: Any) -> None:
    """Calls the core with arrays as pointers; raises its message when it refuses."""
    values = {name: value.ctypes.data if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    core = library()
    if getattr(core, function)(ctypes.byref(struct(**values))):
        raise UserError(core.fptq_last_error().decode())


def _float_array(name: str, x: Array) -> tuple[Array, int, np.dtype[Any]]:
    """A contiguous x, the core's number of its dtype, and the dtype of computation."""
    array = np.ascontiguousarray(x).reshape(np.shape(x))
    if array.dtype not in _DTYPES:
        raise UserError(f"{name}: x has dtype {array.dtype}; float32, float64 and float16 are supported")
    return array, _DTYPES[array.dtype], np.dtype(np.float64 if array.dtype == np.float64 else np.float32)


def _grid(grid: IntegerGrid) -> Any:
    return _Grid(grid.kind, grid.qmin, grid.qmax)


def fake_quant(
    x: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    grid: IntegerGrid,
    granularity: Granularity = PerTensor(),  # noqa: B008  a frozen value
) -> Array:
    """``fptquant.ops.fake_quant`` on a NumPy array: y = (clamp(rint(x / scale) + zero_point, qmin, qmax) - zero_point) * scale.

    Raises:
        UserError: if the shapes do not fit, the dtype is not floating, or a scale is zero, negative or not finite.

    >>> fake_quant(np.array([0.24, 0.26, 9.0]), np.array(0.5), grid=IntegerGrid(4))
    array([0. , 0.5, 3.5])
    """
    x, dtype, compute = _float_array("fake_quant", x)
    layout = channel_layout(granularity, x.shape)
    scales = np.ascontiguousarray(scale, compute)
    zeros = None if zero_point is None else np.ascontiguousarray(zero_point, compute)
    for label, array in (("scale", scales), ("zero_point", zeros)):
        if array is not None and array.size != layout.channels:
            raise UserError(
                f"fake_quant: {label} has shape {array.shape}, but {granularity} on {x.shape} needs {layout.scale_shape}"
            )
    y = np.empty_like(x)
    sizes = {"outer": layout.outer, "channels": layout.channels, "inner": layout.inner}
    _call(
        "fptq_fake_quant_forward",
        _FakeQuantForward,
        y=y,
        x=x,
        scale=scales,
        zero_point=zeros,
        **sizes,
        grid=_grid(grid),
        dtype=dtype,
    )
    return y


def set_range(
    x: Array,
    *,
    grid: IntegerGrid,
    granularity: Granularity = PerTensor(),  # noqa: B008  a frozen value
    method: RangeMethod = RangeMethod(),  # noqa: B008  a frozen value
) -> tuple[Array, Array]:
    """``fptquant.ops.set_range`` on a NumPy array: the static (scale, zero_point) of each channel.

    Raises:
        UserError: if the granularity does not fit the shape or the dtype is not floating.

    >>> set_range(np.array([[-7.0, 1.0], [0.0, 14.0]]), grid=IntegerGrid(4))[0]
    array(2.)
    """
    x, dtype, compute = _float_array("set_range", x)
    layout = channel_layout(granularity, x.shape)
    lo, hi, scale, zero_point = (np.empty(layout.channels, compute) for _ in range(4))
    seen: dict[str, Any] = {"x": x, "lo": lo, "hi": hi, "dtype": dtype}
    seen |= {"outer": layout.outer, "channels": layout.channels, "inner": layout.inner}
    ratios = np.ascontiguousarray(method.ratios(), np.float64)
    options = {"grid": _grid(grid), "symmetric": grid.symmetric}
    _call("fptq_range_minmax", _RangeMinmax, **seen)
    evidence = np.empty((layout.channels, 0))
    if method.method == "percentile":
        evidence = np.empty((layout.channels, HISTOGRAM_BINS))
        _call("fptq_range_histogram", _RangeHistogram, counts=evidence, bins=HISTOGRAM_BINS, **seen)
    elif method.method != "min_max":
        evidence = np.empty((layout.channels, ratios.size))
        candidates = {"ratios": ratios, "candidates": ratios.size, "p": method.exponent}
        _call("fptq_range_errors", _RangeErrors, errors=evidence, **candidates, **seen, **options)
    _call(
        "fptq_set_range",
        _SetRange,
        scale=scale,
        zero_point=zero_point,
        lo=lo,
        hi=hi,
        evidence=evidence,
        ratios=ratios,
        channels=layout.channels,
        n=evidence.shape[1],
        rule=RULES[method.method],
        percentile=method.percentile,
        dtype=dtype,
        **options,
    )
    return scale.reshape(layout.scale_shape), zero_point.reshape(layout.scale_shape)


def hadamard(x: Array, *, block_size: int | None = None, transpose: bool = False) -> Array:
    """``fptquant.ops.hadamard`` on a NumPy array: y = H x / sqrt(n), or H^T x / sqrt(n), on blocks of the last axis.

    Raises:
        UserError: if no Hadamard matrix of this size can be constructed, the block does not divide the last axis, or the
            dtype is not floating.

    >>> hadamard(np.array([1.0, 0.0, 0.0, 0.0]))
    array([0.5, 0.5, 0.5, 0.5])
    """
    x, dtype, _ = _float_array("hadamard", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UserError(f"hadamard: x has shape {x.shape}; the last axis needs at least one element")
    size = x.shape[-1] if block_size is None else block_size
    if size < 1 or x.shape[-1] % size:
        raise UserError(f"hadamard: block_size = {size} does not divide the last axis of shape {x.shape}")
    y = np.empty_like(x)
    _call("fptq_hadamard", _Hadamard, y=y, x=x, blocks=x.size // size, size=size, transpose=transpose, dtype=dtype)
    return y


def pack_int4(q: Array, *, signed: bool = True) -> Array:
    """``fptquant.ops.pack_int4`` on a NumPy array: int8 [R, C] to uint8 [R, ceil(C / 2)], the even column in the low nibble.

    Raises:
        UserError: if q is not an int8 matrix, or a value lies outside -8..7 (0..15 if not ``signed``).

    >>> pack_int4(np.array([[1, 2, -1]], np.int8))
    array([[33, 15]], dtype=uint8)
    """
    if q.ndim != 2 or q.dtype != np.int8:
        raise UserError(f"pack_int4: q is {q.dtype} of shape {q.shape}; it must be an int8 matrix")
    q = np.ascontiguousarray(q)
    rows, columns = q.shape
    packed = np.empty((rows, (columns + 1) // 2), np.uint8)
    _call("fptq_pack_int4", _PackInt4, packed=packed, q=q, rows=rows, columns=columns, is_signed=signed)
    return packed


def unpack_int4(packed: Array, columns: int, *, signed: bool = True) -> Array:
    """``fptquant.ops.unpack_int4`` on a NumPy array: the inverse of ``pack_int4``, int8 [R, columns].

    Raises:
        UserError: if packed is not a uint8 matrix of that width.

    >>> unpack_int4(np.array([[33, 15]], np.uint8), 3)
    array([[ 1,  2, -1]], dtype=int8)
    """
    if packed.ndim != 2 or packed.dtype != np.uint8 or columns < 0 or packed.shape[1] != (columns + 1) // 2:
        raise UserError(
            f"unpack_int4: packed is {packed.dtype} of shape {packed.shape}; {columns} columns need a uint8 matrix of "
            f"{(columns + 1) // 2} columns"
        )
    packed = np.ascontiguousarray(packed)
    q = np.empty((packed.shape[0], columns), np.int8)
    _call("fptq_unpack_int4", _UnpackInt4, q=q, packed=packed, rows=q.shape[0], columns=columns, is_signed=signed)
    return q
