"""Transforms merged in every pass: no weight has two merged copies at a time, and the result is that of merging one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.instrument import instrument
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.stages.set_ranges import set_weight_ranges_
from fptquant.training.transform_student import TransformStudent, attach_transforms_
from fptquant.transforms import TransformOptions
from tests.models.prepare import setting
from tests.models.tiny import token_ids
from tests.stages.transformed import fused_model, random_transforms
from tests.training.test_student import settings

TRANSFORMS = TransformOptions(query_key_rotation=True, value_mixing="hadamard", up_scaling=True, down_hadamard=True)


class MergedCopies(TorchDispatchMode):
    """Counts tensors of a weight's size, other than the weight and quantized ones, that exist at the same time."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.size = weight.untyped_storage().nbytes()
        self.ignored = {StorageWeakRef(weight.untyped_storage())}
        self.copies: set[StorageWeakRef] = set()
        self.most = 0

    def now(self) -> int:
        self.copies = {copy for copy in self.copies if not copy.expired()}
        return len(self.copies)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                storage = StorageWeakRef(tensor.untyped_storage())
                (self.ignored if "fake_quant" in str(func) else self.copies).add(storage)
        self.copies -= self.ignored
        self.most = max(self.most, self.now())
        return result


def make_student(rotation: float | None = None) -> TransformStudent:
    model = fused_model("LlamaForCausalLM", "hidden-576", dtype=torch.float32).requires_grad_(False)
    transforms = random_transforms(model, TRANSFORMS)
    instrument(model, setting(16, weight_bits=4), down_hadamard=True)
    attach_transforms_(model, transforms)
    set_weight_ranges_(model)
    return TransformStudent(model, transforms, settings(rotation))


@pytest.fixture(scope="module")
def student() -> TransformStudent:
    made = make_student()
    made._prepare()
    return made


def test_the_count_sees_two_copies() -> None:
    weight = torch.randn(8, 8)
    with MergedCopies(weight) as copies:
        first = weight * 2
        first + 1
        assert copies.most == 2
        assert copies.now() == 1
        del first
        assert copies.now() == 0


@pytest.mark.parametrize("name", LINEAR_NAMES)
def test_at_most_one_merged_copy_of_a_weight(student: TransformStudent, name: str) -> None:
    linear = student.view.blocks[0].linear(name)
    assert isinstance(linear, QuantizedLinear)
    with MergedCopies(linear.weight) as copies:
        quantized = linear.quantized_weight()
        kept = copies.now()
    fused = name in ("q_proj", "k_proj", "up_proj", "gate_proj")
    assert copies.most == kept == (0 if fused else 1)
    assert not torch.equal(quantized, linear.weight)


def test_a_step_keeps_no_more_either() -> None:
    """Through a whole step, largest weight (o_proj): the one merged copy of each layer, gradients aside."""
    student = make_student()
    weights = [block.linear("o_proj").weight for block in student.view.blocks]
    with MergedCopies(weights[0]) as copies:
        copies.ignored |= {StorageWeakRef(p.untyped_storage()) for p in student.model.parameters()}
        loss = student(token_ids())
        # q_proj is as large, but its merged copy does not exist
        assert copies.most == len(weights)
    loss.backward()


def test_merging_in_one_go_is_merging_one_by_one(student: TransformStudent) -> None:
    for name in LINEAR_NAMES:
        linear = student.view.blocks[1].linear(name)
        assert isinstance(linear, QuantizedLinear)
        assert linear.weight_quantizer is not None
        merged = linear.weight
        for transform, side in linear.merging.steps if linear.merging is not None else ():
            merged = transform.merge(merged, side)
        assert torch.equal(linear.merged_weight(), merged)
        assert torch.equal(linear.quantized_weight(), linear.weight_quantizer(merged))


def test_with_a_trained_rotation_no_merged_copy_is_kept_and_the_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student(rotation=0.1)
    assert student.rotation is not None
    student.rotation.randomize_(torch.Generator().manual_seed(1))
    student._prepare()
    for name in LINEAR_NAMES:
        linear = student.view.blocks[0].linear(name)
        assert isinstance(linear, QuantizedLinear)
        assert linear.merging is not None
        with MergedCopies(linear.weight) as copies:
            copies.ignored.add(StorageWeakRef(student.rotation.matrix().untyped_storage()))  # as large as a weight here
            quantized = linear.quantized_weight()
            assert copies.now() == (1 if len(linear.merging.steps) == 1 else 0)
        assert quantized.requires_grad
    student(token_ids()).backward()
    expected = {name: p.grad for group in student.parameter_groups().values() for name, p in group}
    student.zero_grad()
    monkeypatch.setattr("fptquant.models.merging.checkpoint", lambda function, *arguments, **options: function(*arguments))
    student(token_ids()).backward()
    for group in student.parameter_groups().values():
        for name, parameter in group:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected[name]), name
