"""Matrix products in float32 by oneDNN, on processors that PyTorch's usual library serves badly.

PyTorch multiplies float32 matrices with MKL, which runs on AMD processors with AVX-512 at half of their speed or less; oneDNN,
also a part of PyTorch, at all of it. Both compute in float32, in other orders: results differ in their last bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fptquant.errors import UserError
from fptquant.processor import cpu_field

P = ParamSpec("P")
Result = TypeVar("Result")

CHOICE = "FPTQUANT_FLOAT32_PRODUCTS"
"""The environment variable: ``onednn``, ``torch``, or ``auto`` (the default: what is faster on this processor)."""
_SMALLEST = 2**20
"""Multiplications; oneDNN's preparation costs more than it gains on smaller products."""
_aten = torch.ops.aten


@cache
def _faster() -> bool:
    """Whether oneDNN is faster here. Where a GPU computes, looking at every operation would only cost time."""
    amd = cpu_field("vendor_id") == "AuthenticAMD"
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cuda.is_available()


@cache
def _offered() -> bool:
    """Whether this PyTorch has oneDNN's linear layer; it is one of its internal operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


def float32_products() -> Literal["oneDNN", "torch"]:
    """Who multiplies float32 matrices on the processor in this run.

    Raises:
        UserError: if the environment variable asks for something else, or for oneDNN where PyTorch lacks it.
    """
    choice = os.environ.get(CHOICE, "auto")
    if choice not in ("auto", "onednn", "torch"):
        raise UserError(f"{CHOICE} = {choice!r} must be auto, onednn or torch")
    if choice == "onednn" and not _offered():
        raise UserError(f"{CHOICE} = onednn, but this PyTorch was built without oneDNN; leave the variable out")
    return "oneDNN" if _offered() and (choice == "onednn" or (choice == "auto" and _faster())) else "torch"


def _suits(a: Tensor, b: Tensor, *others: Tensor) -> bool:
    """Whether a b, and what is added to it, are for oneDNN."""
    return a.numel() * b.shape[1] >= _SMALLEST and all(
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for tensor in (a, b, *others)
    )


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, copied if it is a part of a larger one: for such oneDNN falls back to loops a thousand times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return y


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a b (+ bias in every row), outside of autograd; ``out`` is memory that may be used for it.

    Shape: a: [rows, inner]; b: [inner, columns]; bias: [columns] or None; out: [rows, columns]. Returns: [rows, columns].
    """
    others = () if bias is None else (bias,)
    if _suits(a, b, *others) and float32_products() == "oneDNN":
        return _linear(a, b.t(), bias)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sends large float32 products of matrices to oneDNN, of backward passes too; everything else goes its way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.mm.default:
            return product(*args)
        if func is _aten.addmm.default and not kwargs and args[0].dim() == 1:
            return product(args[1], args[2], args[0])
        if func in (_aten.linear.default, _aten.matmul.default):  # whole, as they are under inference_mode
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


class _Thread(threading.local):
    active = False


_thread = _Thread()


def fast_float32_products(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function with its float32 products, of its own thread, made by whom `float32_products` names."""

    @wraps(function)
    def with_products(*args: P.args, **kwargs: P.kwargs) -> Result:
        if _thread.active or float32_products() == "torch":
            return function(*args, **kwargs)
        _thread.active = True
        try:
            with _Products():  # type: ignore[no-untyped-call]
                return function(*args, **kwargs)
        finally:
            _thread.active = False

    return with_products
