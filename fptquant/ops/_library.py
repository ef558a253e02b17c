"""The operator library ``fptquant``: how schemas, fallbacks, shape functions and gradients are registered.

A schema uses only Tensor, int, float and bool and is functional. An optional tensor travels as a tensor without
elements (see ``absent``). The plain-torch reference is registered under CompositeExplicitAutograd, so that it serves
every device that has no compiled kernel; the C core registers its kernels under the device's own key, which wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fptquant"
LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str) -> None:
    """Declares an operator, for example ``define("hadamard(Tensor x, int block_size, bool transpose) -> Tensor")``."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def fallback(name: str, function: Callable[..., Any]) -> None:
    """Registers the plain-torch ``function`` for every device that has no compiled kernel of operator ``name``."""
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def fake(name: str, function: Callable[..., Any]) -> None:
    """Registers the function that gives shapes and dtypes of the outputs without data (torch.compile, meta tensors)."""
    torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=LIBRARY)


def autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Registers the gradient of an operator; ``backward(ctx, *gradients)`` gives one gradient per argument."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def operator(name: str) -> Callable[..., Any]:
    """The registered operator, ready to call."""
    packet: Any = getattr(torch.ops.fptquant, name)
    overload: Callable[..., Any] = packet.default
    return overload


def derivative(name: str, tensors: int) -> None:
    """Shapes and gradient of operator ``name``: its first ``tensors`` (2 or more) arguments are tensors, its output like the first.

    Its gradient is the operator ``<name>_backward``: of dy, all arguments, and whether the first one's gradient is wanted, it
    gives a gradient for each tensor; that of the first has no elements where it is not wanted.
    """
    backward = operator(f"{name}_backward")

    def fake_backward(dy: Tensor, first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dfirst = torch.empty_like(first) if rest[-1] else first.new_empty(0)
        return dfirst, *(torch.empty_like(tensor) for tensor in rest[: tensors - 1])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0]
        dfirst, *others = backward(dy.contiguous(), *ctx.saved_tensors, *ctx.options, wanted)
        return (dfirst if wanted else None), *others, *(None for _ in ctx.options)

    fake(name, lambda first, *rest: torch.empty_like(first))
    fake(f"{name}_backward", fake_backward)
    autograd(name, setup_context, gradient)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything narrower: what every operator computes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_values(x: Tensor) -> Tensor:
    """An empty tensor for one value of each row of ``x``, [..., 1], in the dtype of computation."""
    return x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x))


def absent(like: Tensor) -> Tensor:
    """A tensor without elements: stands for an optional tensor that was not given."""
    return like.new_empty(0, dtype=compute_dtype(like))


def parameter(tensor: Tensor | None, like: Tensor) -> Tensor:
    """``tensor`` in the dtype of computation of ``like`` (differentiable), or the absent tensor."""
    return absent(like) if tensor is None else tensor.to(compute_dtype(like)).contiguous()
