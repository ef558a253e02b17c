"""linear_divergence, linear_jsd, linear_cross_entropy: reference, gradient, chunks, autocast, opcheck, edge cases, errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops.divergence import KINDS
from tests.memory import NO_RESERVE, measurable
from tests.ops.common import DTYPES, random
from tests.program import run_python
from tests.tolerances import UNIT, compute_dtype

EMPTY = torch.empty(0)
module = importlib.import_module("fptquant.ops.linear_divergence")  # the package's attribute is the function


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """student, teacher, weight, bias, teacher_weight, teacher_bias."""
    shapes = ((3, 7, 20), (3, 7, 24), (45, 20), (45,), (45, 24), (45,))
    return tuple(random(*shape, dtype=dtype, seed=seed) / 2 for seed, shape in enumerate(shapes))  # type: ignore[return-value]


@pytest.fixture(params=[2**27, 2000, 1], ids=["one chunk", "many chunks", "a token at a time"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("head", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_divergence_of_all_logits(dtype: torch.dtype, head: bool) -> None:
    """Matrix products of 45 terms in two orders: 45 units; the gradient of bfloat16 logits is rounded once more."""
    student, teacher, weight, bias, teacher_weight, teacher_bias = inputs(dtype)
    leaves = [student.requires_grad_(), *((weight.requires_grad_(), bias.requires_grad_()) if head else ())]
    bound, dloss = 45 * UNIT[dtype], random(3, 7, dtype=compute_dtype(dtype), seed=9)
    teacher_logits = teacher @ teacher_weight.T + teacher_bias
    target = teacher_logits.argmax(-1)
    for kind in (*KINDS, "cross_entropy"):
        logits = torch.nn.functional.linear(student, weight, bias)
        if kind == "cross_entropy":
            mine = ops.linear_cross_entropy(student, target, weight, bias, temperature=1.5)
            full = ops.cross_entropy(logits, target, temperature=1.5)
        else:
            options = {"teacher_weight": teacher_weight, "teacher_bias": teacher_bias, "temperature": 1.5}
            mine = ops.linear_divergence(student, teacher, weight, bias, kind=kind, **options)
            full = ops.divergence(logits, teacher_logits, kind=kind, temperature=1.5)
        assert mine.dtype == compute_dtype(dtype)
        assert (mine - full).abs().max() <= bound * full.abs().max().clamp(min=1)
        for a, b in zip(torch.autograd.grad(mine, leaves, dloss), torch.autograd.grad(full, leaves, dloss), strict=True):
            assert a.dtype == b.dtype == dtype
            assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.usefixtures("chunk_bytes")
def test_mask() -> None:
    student, teacher, weight, *_ = inputs(torch.float64)
    teacher, mask = teacher[..., :20], torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    student[~mask] = torch.nan  # what does not count may be anything
    loss = ops.linear_jsd(student.requires_grad_(), teacher, weight, mask=mask)
    full = ops.divergence(student.detach() @ weight.T, teacher @ weight.T)
    torch.testing.assert_close(loss, torch.where(mask, full, 0.0))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient[~mask] == 0).all()
    assert gradient[mask].abs().min() > 0
    target = torch.where(mask, 3, -100)
    expected = torch.where(mask, ops.cross_entropy(student.detach() @ weight.T, target.clamp(min=0)), 0.0)
    torch.testing.assert_close(ops.linear_cross_entropy(student, target, weight, mask=mask), expected)
    assert ops.linear_jsd(student, teacher, weight, mask=torch.zeros_like(mask)).abs().max() == 0


@pytest.mark.usefixtures("chunk_bytes")
def test_gradient() -> None:
    student, teacher, head = random(4, 3).requires_grad_(), random(4, 3, seed=1), random(6, 3, seed=2)
    weight, bias = random(6, 3, seed=3).requires_grad_(), random(6, seed=4).requires_grad_()
    for kind in KINDS:
        assert torch.autograd.gradcheck(
            lambda h, w, b, k=kind: ops.linear_divergence(h, teacher, w, b, teacher_weight=head, kind=k), (student, weight, bias)
        )
        assert torch.autograd.gradcheck(lambda h, k=kind: ops.linear_divergence(h, teacher, head, kind=k), student)
    target = torch.tensor([0, 5, 1, 1])
    assert torch.autograd.gradcheck(lambda h, w: ops.linear_cross_entropy(h, target, w), (student, weight))


def test_without_gradients_nothing_is_kept() -> None:
    student, teacher, weight, *_ = inputs(torch.float32)
    teacher = teacher[..., :20]
    with torch.no_grad():
        loss = ops.linear_jsd(student.requires_grad_(), teacher, weight)
    assert not loss.requires_grad
    assert torch.equal(loss, ops.linear_jsd(student, teacher, weight).detach())
    assert not ops.linear_jsd(student.detach(), teacher.requires_grad_(), weight).requires_grad


def test_autocast() -> None:
    """Logits as torch.nn.functional.linear gives them under autocast; the loss in float32, the gradient in the leaf's dtype."""
    student, teacher, weight, *_ = inputs(torch.float32)
    teacher = teacher[..., :20]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_jsd(student.requires_grad_(), teacher, weight.requires_grad_())
        assert torch.nn.functional.linear(student, weight).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    expected = ops.linear_jsd(student.bfloat16(), teacher.bfloat16(), weight.bfloat16())
    assert torch.equal(loss, expected)
    for a, b in zip(*(torch.autograd.grad(value.sum(), (student, weight)) for value in (loss, expected)), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_opcheck() -> None:
    student, teacher, weight = (random(5, 6, dtype=torch.float32, seed=seed) for seed in range(3))
    plain = (student, teacher, weight, EMPTY, EMPTY, EMPTY, 0, 1.0)
    torch.library.opcheck(torch.ops.fptquant.linear_divergence.default, (*plain, False))
    torch.library.opcheck(torch.ops.fptquant.linear_divergence.default, (student.clone().requires_grad_(), *plain[1:], True))
    trained = (student.clone().requires_grad_(), teacher, weight.clone().requires_grad_(), *plain[3:])
    torch.library.opcheck(torch.ops.fptquant.linear_divergence.default, (*trained, False))
    backward = torch.ops.fptquant.linear_divergence_backward.default
    torch.library.opcheck(backward, (random(5, dtype=torch.float32), *plain, True, True, False))


def test_compiles_into_one_graph() -> None:
    student, teacher, weight = (random(5, 6, dtype=torch.float32, seed=seed) for seed in range(3))
    compiled = torch.compile(lambda h: ops.linear_jsd(h, teacher, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(student), ops.linear_jsd(student, teacher, weight))


MEMORY = """
import torch
from fptquant import ops
from tests.memory import memory
student, teacher, weight = torch.randn(512, 16, requires_grad=True), torch.randn(512, 16), torch.randn(128256, 16)
ops.linear_jsd(student[:2], teacher[:2], weight[:64]).sum().backward()
before = memory("VmRSS")
ops.linear_jsd(student, teacher, weight).sum().backward()
print(memory("VmHWM") - before)
"""


@measurable
def test_full_logits_never_exist() -> None:
    """512 tokens of 128,256: one of the two models' logits alone would be 250 MiB; two buffers and little else are allowed."""
    assert 0 < int(run_python(MEMORY, environment=NO_RESERVE)) < module.CHUNK_BYTES + 32 * 2**20


def test_edges() -> None:
    weight = torch.ones(4, 2)
    empty = torch.empty(0, 2, requires_grad=True)
    loss = ops.linear_jsd(empty, torch.empty(0, 2), weight)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 2)
    assert ops.linear_jsd(torch.ones(2), torch.ones(2), weight).shape == ()
    bad = ops.linear_jsd(torch.tensor([[torch.nan, 1.0], [1.0, 1.0]]), torch.ones(2, 2), weight)
    assert bad.isnan().tolist() == [True, False]


def test_errors() -> None:
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    with pytest.raises(UserError, match=r"student \[2, 3\] and teacher \[4, 3\] must hold the same tokens"):
        ops.linear_jsd(hidden, torch.zeros(4, 3), weight)
    with pytest.raises(UserError, match=r"hidden states \[2, 3\] and weight \[5, 4\] must be \[..., H\] and \[V, H\]"):
        ops.linear_jsd(hidden, hidden, torch.zeros(5, 4))
    with pytest.raises(UserError, match=r"the teacher's hidden states \[2, 4\] and the teacher's weight \[5, 3\]"):
        ops.linear_jsd(hidden, torch.zeros(2, 4), weight)
    with pytest.raises(UserError, match=r"weight \[5, 3\] and teacher_weight \[6, 3\] differ in vocabulary"):
        ops.linear_jsd(hidden, hidden, weight, teacher_weight=torch.zeros(6, 3))
    with pytest.raises(UserError, match="teacher_bias needs a teacher_weight"):
        ops.linear_jsd(hidden, hidden, weight, teacher_bias=torch.zeros(5))
    with pytest.raises(UserError, match=r"bias has shape \[4\], but the weight needs \[5\]"):
        ops.linear_jsd(hidden, hidden, weight, torch.zeros(4))
    with pytest.raises(UserError, match=r"torch.bfloat16, torch.float32; they must have one, or run under torch.autocast"):
        ops.linear_jsd(hidden.bfloat16(), hidden, weight)
    with pytest.raises(UserError, match=r"mask \[2\] torch.int64 must be \[2\] of torch.bool"):
        ops.linear_jsd(hidden, hidden, weight, mask=torch.ones(2, dtype=torch.int64))
    with pytest.raises(UserError, match="target runs from 0 to 5, outside the vocabulary of 5 tokens"):
        ops.linear_cross_entropy(hidden, torch.tensor([0, 5]), weight)
