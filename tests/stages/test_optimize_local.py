"""Local optimization: closed forms are minima, at least as low as AdamW's 200 steps, in less time, on real-ish weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.errors import UserError
from fptquant.models.adapter import BlockView, model_sizes
from fptquant.models.architectures import view_model
from fptquant.stages.merge_transforms import merge_blocks_
from fptquant.stages.optimize_local import (
    LocalOptions,
    heads_of_value,
    optimize_block_,
    optimize_local_,
    query_key_loss,
    solve_query_key_,
    solve_up_scaling_,
    up_scaling_loss,
    value_loss,
)
from fptquant.transforms import BlockTransforms, QueryKeyRotation, TransformOptions, UpScaling, ValueMixing, build_transforms
from fptquant.transforms.base import generator
from tests.stages.transformed import fused_model, logits, relative_error

ALL = TransformOptions(query_key_rotation=True, value_mixing="hadamard", up_scaling=True)
NAMES = ("query_key_rotation", "value_mixing", "up_scaling")


def realistic_model(*, layers: int = 1, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Weights as trained ones are: rows and columns of very different size, dimensions correlated, some entries large."""
    model = fused_model("LlamaForCausalLM", "hidden-72", dtype=dtype, num_hidden_layers=layers)
    rng = generator(7)

    def spread(size: int) -> Tensor:
        return torch.exp(0.8 * torch.randn(size, generator=rng))

    with torch.no_grad():
        for block in view_model(model).blocks:
            for _, linear in block.linears():
                rows, columns = linear.weight.shape
                noise = torch.randn(rows, columns, generator=rng)
                shared = torch.randn(rows, 4, generator=rng) @ torch.randn(4, columns, generator=rng)
                weight = (noise * noise.abs() + 0.5 * shared) * spread(rows)[:, None] * spread(columns)
                linear.weight.copy_(0.02 * weight)
    return model


def first_block(model: PreTrainedModel) -> BlockView:
    return view_model(model).blocks[0]


def transforms_of(model: PreTrainedModel, options: TransformOptions = ALL) -> BlockTransforms:
    return build_transforms(model_sizes(view_model(model)), options).block(0)


def test_closed_forms_are_at_least_as_low_as_adamw_in_less_time() -> None:
    model = realistic_model()
    closed, reference = (
        optimize_block_(first_block(model), transforms_of(model), LocalOptions(method=method))
        for method in ("closed_form", "adamw")
    )
    for name in NAMES:
        assert closed[name].before == pytest.approx(reference[name].before, rel=1e-5)
        assert closed[name].after <= reference[name].after * (1 + 1e-6), name
        assert reference[name].after < reference[name].before
    assert sum(closed[name].seconds for name in NAMES) < reference["up_scaling"].seconds
    condition = closed["value_mixing"].condition_number
    assert condition is not None
    assert condition < 100


def test_the_query_key_minimum_is_stationary_and_global() -> None:
    model = realistic_model(dtype=torch.float64)
    key, query = first_block(model).k_proj.weight.detach(), first_block(model).q_proj.weight.detach()
    rotation = QueryKeyRotation(2, 64).double()
    solve_query_key_(rotation, key, query)
    best = query_key_loss(rotation, key, query)
    best.backward()  # type: ignore[no-untyped-call]
    for gradient in (rotation.angle.grad, rotation.log_scale.grad):
        assert gradient is not None
        assert float(gradient.abs().max()) < 1e-7 * float(best.detach())
    for seed in range(5):
        other = QueryKeyRotation(2, 64).double().requires_grad_(False)
        other.randomize_(generator(seed), spread=1.0)
        other.log_scale.copy_(rotation.log_scale.detach())
        assert float(query_key_loss(other, key, query).detach()) >= float(best.detach()) * (1 - 1e-12)


@pytest.mark.parametrize("p", [2.0, 4.0, 6.0])
def test_the_up_scaling_minimum_is_stationary_for_every_p(p: float) -> None:
    block = first_block(realistic_model(dtype=torch.float64))
    up, down = block.up_proj.weight.detach(), block.down_proj.weight.detach()
    scaling = UpScaling(112).double()
    before = float(up_scaling_loss(scaling, up, down, p).detach())
    report = solve_up_scaling_(scaling, up, down, p)
    after = up_scaling_loss(scaling, up, down, p)
    after.backward()  # type: ignore[no-untyped-call]
    assert scaling.log_scale.grad is not None
    assert float(scaling.log_scale.grad.abs().max()) < 1e-12 * float(after.detach())
    assert report.before == pytest.approx(before, rel=1e-12)
    assert report.after == pytest.approx(float(after.detach()), rel=1e-12)
    assert report.after < report.before


def test_up_scaling_balances_euclidean_norms_where_the_down_hadamard_mixes_channels() -> None:
    """T_d spreads every channel, so the error is |down'| |x'| with Euclidean norms; elsewhere the exponent is that of the rest."""
    block = first_block(realistic_model())
    row, column = (block.up_proj.weight.double().norm(dim=1), block.down_proj.weight.double().norm(dim=0))
    mixed = TransformOptions(up_scaling=True, down_hadamard=True)
    for options, up_p, expected in [
        (mixed, None, (column / row).log() / 2),
        (TransformOptions(up_scaling=True), 2.0, (column / row).log() / 2),
    ]:
        transforms = transforms_of(realistic_model(), options)
        optimize_block_(block, transforms, LocalOptions(up_p=up_p))
        assert transforms.up_scaling is not None
        torch.testing.assert_close(transforms.up_scaling.log_scale.double(), expected, rtol=1e-5, atol=1e-6)
    fourth = transforms_of(realistic_model(), mixed)
    optimize_block_(block, fourth, LocalOptions(up_p=4.0))
    a, b = block.up_proj.weight.double().pow(4).sum(1), block.down_proj.weight.double().pow(4).sum(0)
    assert fourth.up_scaling is not None
    torch.testing.assert_close(fourth.up_scaling.log_scale.double(), (b / a).log() / 8, rtol=1e-5, atol=1e-6)


def test_dead_channels_keep_their_scale() -> None:
    up, down = torch.ones(3, 5), 16 * torch.ones(5, 3)
    up[0], down[:, 1] = 0, 0
    scaling = UpScaling(3).requires_grad_(False)
    report = solve_up_scaling_(scaling, up, down)
    assert scaling.log_scale.exp().tolist() == pytest.approx([1.0, 1.0, 4.0])
    assert report.after == pytest.approx(5 * 16.0**4 + 5 + 2 * 5 * 16.0**2)


def test_the_value_term_is_the_norm_of_what_is_merged() -> None:
    block = first_block(realistic_model())
    mixing = ValueMixing(2, 64).requires_grad_(False)
    mixing.randomize_(generator(0))
    heads = heads_of_value(block.v_proj.weight.detach(), block.o_proj.weight.detach(), 2, 64)
    merged = mixing.merge_into(block.v_proj.weight.detach(), "value"), mixing.merge_into(block.o_proj.weight.detach(), "output")
    expected = sum(float(weight.double().pow(4).sum()) for weight in merged)
    assert float(value_loss(mixing, *heads)) == pytest.approx(expected, rel=1e-5)
    assert float(value_loss(mixing, *heads, p=3.0)) == pytest.approx(
        sum(float(weight.double().abs().pow(3).sum()) for weight in merged), rel=1e-5
    )


@pytest.mark.parametrize("method", ["closed_form", "adamw"])
def test_a_whole_model_reports_merges_and_keeps_its_logits(method: str) -> None:
    model = realistic_model(layers=2, dtype=torch.float64)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    transforms = build_transforms(model_sizes(view_model(model)), ALL)
    calls: list[tuple[int, int, str]] = []
    report = optimize_local_(
        model,
        transforms,
        method="closed_form" if method == "closed_form" else "adamw",
        steps=5,
        value_steps=20,
        progress=lambda done, total, text: calls.append((done, total, text)),
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]
    facts = report.as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["method"] == method
    for name in NAMES:
        assert facts[name]["after"] < facts[name]["before"]
        assert facts[name]["after"] == pytest.approx(sum(block[name].after for block in report.blocks))
    merge_blocks_(model, transforms)
    assert relative_error(logits(model), before) < 1e-11


def test_it_is_deterministic() -> None:
    model = realistic_model()
    first, again = transforms_of(model), transforms_of(model)
    for transforms in (first, again):
        optimize_block_(first_block(model), transforms, LocalOptions())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_bfloat16_weights_are_optimized_in_float32() -> None:
    model = realistic_model(dtype=torch.bfloat16)
    transforms = transforms_of(model)
    report = optimize_block_(first_block(model), transforms, LocalOptions())
    assert all(report[name].after < report[name].before for name in NAMES)
    assert transforms.up_scaling is not None
    assert transforms.up_scaling.log_scale.dtype == torch.float32


def test_none_and_nothing_to_train_do_nothing() -> None:
    model = realistic_model()
    transforms = transforms_of(model)
    assert optimize_block_(first_block(model), transforms, LocalOptions(method="none")) == {}
    assert transforms.up_scaling is not None
    assert not bool(transforms.up_scaling.log_scale.any())
    assert optimize_block_(first_block(model), BlockTransforms(), LocalOptions(method="adamw")) == {}


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="closed forms exist for p = 4"):
        LocalOptions(p=3.0)
    with pytest.raises(UserError, match=r"local.method = 'sgd' is not known; choose one of closed_form, adamw, none"):
        LocalOptions(method="sgd")  # type: ignore[arg-type]
    model = realistic_model()
    two_blocks = build_transforms(model_sizes(view_model(realistic_model(layers=2))), ALL)
    with pytest.raises(UserError, match="the model has 1 blocks, the transforms were built for 2"):
        optimize_local_(model, two_blocks)
