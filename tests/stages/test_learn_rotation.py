"""T_r is learned: the gradient is right, rows come from every weight, the norm falls, the logits stay."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from fptquant.errors import UserError
from fptquant.models.architectures import view_model
from fptquant.stages.learn_rotation import learn_rotation_, relative_gradient, residual_weights, sample_rows
from fptquant.stages.merge_transforms import rotate_residual_
from fptquant.transforms import ResidualRotation
from fptquant.transforms.base import generator, random_orthogonal
from fptquant.transforms.residual_rotation import cayley
from tests.stages.transformed import fused_model, logits, relative_error


@pytest.mark.parametrize("p", [3.0, 4.0])
def test_gradient_is_that_of_the_objective(p: float) -> None:
    rng = generator(0)
    rows, rotation = torch.randn(20, 6, generator=rng, dtype=torch.float64), random_orthogonal(6, rng)
    gradient = relative_gradient(rows, rotation, p)
    direction = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    direction = direction - direction.T

    def loss(step: float) -> float:
        return float((rows @ (cayley(step * direction) @ rotation).T).abs().pow(p).sum())

    assert float((gradient * direction).sum()) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)
    assert torch.equal(gradient, -gradient.T)


def test_rows_come_from_every_weight_by_its_share() -> None:
    model = fused_model("Qwen2ForCausalLM", dtype=torch.float32)
    view = view_model(model)
    weights = list(residual_weights(view))
    assert len(weights) == 2 + 7 * 2
    assert {side for _, side in weights} == {"embedding", "read", "write"}
    with torch.no_grad():
        for number, (weight, _) in enumerate(weights):
            weight.fill_(number + 1)
    rows = sample_rows(view, 200, generator(0))
    assert rows.shape[1] == 36
    assert set(rows[:, 0].tolist()) == {float(number + 1) for number in range(len(weights))}
    assert 150 < len(rows) < 250


def outlier_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in which a few directions of the residual, spread by no Hadamard matrix in particular, are large."""
    model = fused_model("LlamaForCausalLM", dtype=dtype)
    rotation = ResidualRotation(36, start="random_orthogonal", seed=9).requires_grad_(False)
    scale = torch.ones(36, dtype=torch.float64)
    scale[::9] = 12.0
    with torch.no_grad():
        for weight, side in residual_weights(view_model(model)):
            scaled = weight.double() * (scale[:, None] if side == "write" else scale)
            weight.copy_(rotation.merge_into(scaled, side))
    return model


def test_it_lowers_the_norm_below_the_start_and_keeps_the_logits() -> None:
    model = outlier_model(torch.float64)
    before = logits(model)
    rotation = ResidualRotation(36, seed=1).requires_grad_(False)
    calls: list[int] = []
    report = learn_rotation_(
        model,
        rotation,
        steps=40,
        lr=0.05,
        rows=400,
        progress=lambda done, total, text: calls.append(done),
    )
    assert report.after < 0.9 * report.before
    assert calls == list(range(1, 41))
    assert report.as_dict()["steps"] == 40
    matrix = rotation.matrix()
    assert float((matrix @ matrix.T - torch.eye(36)).abs().max()) < 1e-13
    rotate_residual_(model, rotation)
    assert relative_error(logits(model), before) < 1e-12


def test_it_is_seeded_and_reads_the_model_only() -> None:
    model = outlier_model()
    untouched = copy.deepcopy(model)
    first, again, other = (ResidualRotation(36).requires_grad_(False) for _ in range(3))
    for rotation, seed in ((first, 0), (again, 0), (other, 1)):
        learn_rotation_(model, rotation, steps=5, rows=100, seed=seed)
    assert torch.equal(first.matrix(), again.matrix())
    assert not torch.equal(first.matrix(), other.matrix())
    pairs = zip(model.parameters(), untouched.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_worse_rotation_is_not_kept() -> None:
    rotation = ResidualRotation(36).requires_grad_(False)
    report = learn_rotation_(outlier_model(), rotation, steps=2, lr=50.0, rows=50)
    assert report.after <= report.before
    assert rotation.is_fast == (report.after == report.before)


def test_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="T_r has size 12, the residual of this model 36"):
        learn_rotation_(outlier_model(), ResidualRotation(12))
