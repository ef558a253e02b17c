"""Divergence straight from hidden states and the head's weight, in chunks of tokens: full logits never exist.

Each chunk's logits of student and teacher go into two buffers that all chunks share (oneDNN makes new ones, after those of the
chunk before are freed); the gradient of the student's logits is written over them and at once multiplied by the head's weight, so
that only the gradient of the hidden states is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.float32_products import product
from fptquant.ops import _library
from fptquant.ops.cross_entropy import check_target
from fptquant.ops.divergence import KINDS, Divergence, check_temperature, kind_index, new_loss

CHUNK_BYTES = 128 * 2**20
"""What the buffers of one chunk may take together: large enough for fast matrix products, small beside any model."""
CROSS_ENTROPY = len(KINDS)
"""The kind in whose operators the teacher is a tensor of targets."""

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor weight, Tensor bias, Tensor teacher_weight, Tensor teacher_bias, "
    "int kind, float temperature"
)
_library.define(f"linear_divergence({_INPUTS}, bool gradient) -> (Tensor, Tensor)")
_library.define(
    f"linear_divergence_backward(Tensor dloss, {_INPUTS}, bool of_student, bool of_weight, bool of_bias) "
    "-> (Tensor, Tensor, Tensor)"
)
_divergence_ = _library.operator("divergence_")
_cross_entropy_ = _library.operator("cross_entropy_")


class _Inputs(NamedTuple):
    """The arguments that forward and backward share: student [T, H]; teacher [T, H'], or targets [T]; absent tensors are empty."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    bias: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    kind: int
    temperature: float

    def chunks(self) -> Iterator[slice]:
        """Runs of tokens whose logits fit into CHUNK_BYTES, as equal as possible."""
        buffers = 1 if self.kind == CROSS_ENTROPY else 2
        tokens = self.student.shape[0]
        most = max(CHUNK_BYTES // (buffers * self.weight.shape[0] * self.weight.element_size()), 1)
        count = -(-tokens // most)
        bounds = [tokens * index // count for index in range(count + 1)] if count else [0]
        return (slice(begin, end) for begin, end in pairwise(bounds))


def _check_in_vocabulary(target: Tensor, vocabulary: int) -> None:
    """Before the first matrix product, and not while a graph is traced."""
    if target.numel() and not (target.min() >= 0 and target.max() < vocabulary):
        raise UserError(
            f"linear_cross_entropy: target runs from {int(target.min())} to {int(target.max())}, outside the vocabulary of "
            f"{vocabulary} tokens"
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, buffer: Tensor) -> Tensor:
    """hidden weight^T + bias, at the beginning of the buffer where the product can be written there."""
    return product(hidden, weight.t(), bias if bias.numel() else None, out=buffer[: hidden.shape[0]])


def _each_chunk(inputs: _Inputs, use: Callable[[slice, Tensor, Tensor], None]) -> None:
    """``use`` (tokens, their losses, the gradient of their student's logits) chunk by chunk; nobody keeps that gradient."""
    if inputs.kind == CROSS_ENTROPY:
        _check_in_vocabulary(inputs.teacher, inputs.weight.shape[0])
    chunks = list(inputs.chunks())
    longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    buffers = [inputs.weight.new_empty(longest, inputs.weight.shape[0]) for _ in range(1 if inputs.kind == CROSS_ENTROPY else 2)]
    for chunk in chunks:
        use(chunk, *_chunk_gradient(inputs, chunk, buffers))


def _chunk_gradient(inputs: _Inputs, chunk: slice, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    gradient = _logits(inputs.student[chunk], inputs.weight, inputs.bias, buffers[0])
    if inputs.kind == CROSS_ENTROPY:
        return _cross_entropy_(gradient, inputs.teacher[chunk], inputs.temperature), gradient
    own_head = inputs.teacher_weight.numel() > 0
    head = (inputs.teacher_weight, inputs.teacher_bias) if own_head else (inputs.weight, inputs.bias)
    teacher = _logits(inputs.teacher[chunk], *head, buffers[1])
    return _divergence_(gradient, teacher, inputs.kind, inputs.temperature), gradient


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, wanted = _Inputs(*arguments[:-1]), arguments[-1]
    loss = new_loss(inputs.student)
    dstudent = torch.empty_like(inputs.student) if wanted else inputs.student.new_empty(0)

    def use(chunk: slice, losses: Tensor, gradient: Tensor) -> None:
        loss[chunk] = losses
        if wanted:
            dstudent[chunk] = product(gradient, inputs.weight)

    with torch.autocast(inputs.student.device.type, enabled=False):
        _each_chunk(inputs, use)
    return loss, dstudent


def _forward_again(dloss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dstudent, dweight, dbias), each only if wanted. Sums over chunks in the dtype of computation."""
    inputs, (of_student, of_weight, of_bias) = _Inputs(*arguments[:-3]), arguments[-3:]
    student, wide = inputs.student, _library.compute_dtype(inputs.student)
    dstudent = torch.empty_like(student) if of_student else student.new_empty(0)
    dweight = torch.zeros_like(inputs.weight, dtype=wide) if of_weight else student.new_empty(0)
    dbias = torch.zeros_like(inputs.bias, dtype=wide) if of_bias else student.new_empty(0)

    def use(chunk: slice, _: Tensor, gradient: Tensor) -> None:
        share = dloss[chunk, None]
        if of_student:
            dstudent[chunk] = product(gradient, inputs.weight) * share
        if of_weight:
            weighted = (student[chunk] * share).to(student.dtype)
            if dweight.dtype == student.dtype:
                dweight.addmm_(gradient.t(), weighted)
            else:
                dweight.add_(torch.mm(gradient.t(), weighted))
        if of_bias:
            dbias.add_(torch.mv(gradient.t(), share[:, 0].to(gradient.dtype)))

    with torch.autocast(student.device.type, enabled=False):
        _each_chunk(inputs, use)
    return dstudent, dweight.to(student.dtype), dbias.to(student.dtype)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    student = arguments[0]
    return new_loss(student), torch.empty_like(student) if arguments[-1] else student.new_empty(0)


def _fake_again(dloss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    of = zip((arguments[0], arguments[2], arguments[3]), arguments[-3:], strict=True)
    return tuple(torch.empty_like(tensor) if wanted else arguments[0].new_empty(0) for tensor, wanted in of)


_library.fallback("linear_divergence", _forward)
_library.fallback("linear_divergence_backward", _forward_again)
_library.fake("linear_divergence", _fake)
_library.fake("linear_divergence_backward", _fake_again)
_linear_divergence = _library.operator("linear_divergence")
_linear_divergence_backward = _library.operator("linear_divergence_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[6:8]
    ctx.kept = inputs[8]
    ctx.save_for_backward(*((output[1],) if ctx.kept else inputs[:6]))


def _backward(ctx: Any, dloss: Tensor | None, unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 9
    if ctx.kept:
        (gradient,) = ctx.saved_tensors
        return (gradient * dloss[:, None]).to(gradient.dtype), *([None] * 8)
    wanted = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    gradients = _linear_divergence_backward(dloss.contiguous(), *ctx.saved_tensors, *ctx.options, *wanted)
    dstudent, dweight, dbias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return dstudent, None, dweight, dbias, *([None] * 5)


_library.autograd("linear_divergence", _setup_context, _backward)


def _check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, label: str = "") -> None:
    """weight is [V, H] for hidden states [..., H], bias is [V]; all have one dtype."""
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise UserError(
            f"{name}: {label}hidden states {list(hidden.shape)} and {label}weight {list(weight.shape)} must be [..., H] and [V, H]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"{name}: {label}bias has shape {list(bias.shape)}, but the weight needs {list(weight.shape[:1])}")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1:
        raise UserError(
            f"{name}: {label}hidden states, weight and bias have the dtypes {', '.join(sorted(map(str, dtypes)))}; they must have "
            "one, or run under torch.autocast"
        )


def _cast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as torch.nn.functional.linear would take them: in autocast's dtype where autocast is on, except float64."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _apply(
    student: Tensor,
    teacher: Tensor,
    head: tuple[Tensor, Tensor | None],
    teacher_head: tuple[Tensor | None, Tensor | None],
    kind: int,
    temperature: float,
    mask: Tensor | None,
) -> Tensor:
    """Losses of the tokens that the mask keeps, 0 elsewhere; teacher is [..., H'] or, for cross-entropy, targets [...]."""
    shape, dtype = student.shape[:-1], _library.compute_dtype(student)
    rows = student.reshape(-1, student.shape[-1])
    teacher = teacher.detach().reshape(rows.shape[0], *teacher.shape[len(shape) :])
    kept = None if mask is None else mask.reshape(-1)
    if kept is not None:
        rows, teacher = rows[kept], teacher[kept]
    others = [_library.absent(rows) if tensor is None else tensor.contiguous() for tensor in (head[1], *teacher_head)]
    needs = torch.is_grad_enabled() and rows.requires_grad
    head_needs = any(tensor is not None and tensor.requires_grad for tensor in head)
    loss: Tensor = _linear_divergence(
        rows.contiguous(),
        teacher.contiguous(),
        head[0].contiguous(),
        others[0],
        others[1].detach(),
        others[2].detach(),
        kind,
        temperature,
        needs and not head_needs,
    )[0]
    if kept is not None:
        loss = torch.zeros(kept.shape, dtype=dtype, device=loss.device).masked_scatter(kept, loss)
    return loss.reshape(shape)


def _check_mask(name: str, mask: Tensor | None, shape: torch.Size) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise UserError(f"{name}: mask {list(mask.shape)} {mask.dtype} must be {list(shape)} of torch.bool, one per token")


def linear_divergence(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: Divergence = "jsd",
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """divergence(student weight^T + bias, teacher weight^T + bias) for each token, without ever building all logits.

    Works through the tokens in chunks; the memory beside the result is two buffers of CHUNK_BYTES together. Where only the
    student's hidden states require a gradient, the forward pass computes it and keeps no more than that; where the head does,
    the backward pass goes through the chunks again.

    Shape:
        student: [..., H] hidden states; teacher: [..., H'] hidden states for the same tokens; weight: [V, H]; bias: [V] or None.
        teacher_weight: [V, H'], teacher_bias: [V] or None; without teacher_weight the teacher's head is the student's.
        mask: [...], bool: tokens that count; the others cost nothing and have loss and gradient 0. (For weights, multiply the
        result.) Returns: [...], float32 (float64 for float64 hidden states).

    Dtypes: logits have the dtype that torch.nn.functional.linear would give them, autocast's under torch.autocast; the
    divergence itself is computed in float32 (float64 for float64) and its gradient rounded to the logits' dtype.

    Gradient: for student, weight and bias, once; none for the teacher and its head.

    Raises:
        UserError: if shapes or dtypes do not fit, or kind or temperature is impossible.

    >>> hidden, weight = torch.eye(3), torch.arange(12.0).reshape(4, 3)
    >>> linear_divergence(hidden, hidden, weight, kind="forward_kl")
    tensor([0., 0., 0.])
    """
    name = "linear_divergence"
    index, temperature = kind_index(name, kind), check_temperature(name, temperature)
    if teacher.shape[:-1] != student.shape[:-1] or teacher.dim() != student.dim():
        raise UserError(f"{name}: student {list(student.shape)} and teacher {list(teacher.shape)} must hold the same tokens")
    if teacher_weight is None and teacher_bias is not None:
        raise UserError(f"{name}: teacher_bias needs a teacher_weight; without one the teacher's head is the student's")
    if teacher_weight is not None and teacher_weight.shape[:1] != weight.shape[:1]:
        raise UserError(f"{name}: weight {list(weight.shape)} and teacher_weight {list(teacher_weight.shape)} differ in vocabulary")
    student, teacher, weight, bias, teacher_weight, teacher_bias = _cast(  # type: ignore[assignment]
        student, teacher, weight, bias, teacher_weight, teacher_bias
    )
    _check_head(name, student, weight, bias)
    _check_head(
        name, teacher, *((weight, bias) if teacher_weight is None else (teacher_weight, teacher_bias)), label="the teacher's "
    )
    _check_mask(name, mask, student.shape[:-1])
    return _apply(student, teacher, (weight, bias), (teacher_weight, teacher_bias), index, temperature, mask)


def linear_jsd(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The Jensen-Shannon divergence from hidden states: `linear_divergence` with its default kind, by the name of the objective.

    >>> linear_jsd(torch.tensor([[50.0]]), torch.tensor([[-50.0]]), torch.tensor([[1.0], [-1.0]]))
    tensor([0.6931])
    """
    return linear_divergence(
        student,
        teacher,
        weight,
        bias,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        kind="jsd",
        temperature=temperature,
        mask=mask,
    )


def linear_cross_entropy(
    student: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """cross_entropy(student weight^T + bias, target) for each token, without ever building all logits.

    Shape:
        student: [..., H] hidden states; target: [...], int64; weight: [V, H]; bias: [V] or None; mask: [...], bool, or None.
        Returns: [...], float32 (float64 for float64 hidden states).

    Memory, dtypes, mask and gradient as in `linear_divergence`. Targets of tokens that the mask leaves out may be anything.

    Raises:
        UserError: if shapes or dtypes do not fit, a target lies outside the vocabulary, or the temperature is impossible.

    >>> linear_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), torch.ones(2, 2))
    tensor([0.6931])
    """
    name = "linear_cross_entropy"
    temperature = check_temperature(name, temperature)
    student, weight, bias = _cast(student, weight, bias)  # type: ignore[assignment]
    _check_head(name, student, weight, bias)
    _check_mask(name, mask, student.shape[:-1])
    counted = target if mask is None or mask.shape != target.shape else torch.where(mask, target, 0)
    check_target(name, counted, student.shape[:-1])
    return _apply(student, counted, (weight, bias), (None, None), CROSS_ENTROPY, temperature, mask)
