"""Clipping as a stage: ranges by the inputs that each weight meets, before GPTQ too, and that a killed run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptquant.files import KeptFiles
from fptquant.models.architectures import view_model
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.quantizers.clip_range import clip_range_
from fptquant.quantizers.gptq import GPTQOptions
from fptquant.rounding.clip_ranges import clip_ranges_
from fptquant.rounding.round_gptq import round_gptq_
from tests.models.tiny import ARCHITECTURES
from tests.rounding.test_round_gptq import FULL, GROUPS, WINDOWS, inputs_of, prepared


def ranges(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear):
            assert linear.weight_quantizer is not None
            assert linear.weight_quantizer.scale is not None
            found[name] = linear.weight_quantizer.scale.clone()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_weight_is_clipped_for_what_it_meets(architecture: str) -> None:
    model, other = prepared(architecture, **FULL), prepared(architecture, **FULL)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    report = clip_ranges_(model, WINDOWS)
    for block in view_model(other).blocks:
        for group in GROUPS:
            x = inputs_of(other, block.linear(group[0]))  # type: ignore[arg-type]
            for linear in (block.linear(name) for name in group):
                assert isinstance(linear, QuantizedLinear)
                assert linear.weight_quantizer is not None
                clip_range_(linear.weight, linear.weight_quantizer, x.T @ x)
    for name, scale in ranges(other).items():
        torch.testing.assert_close(ranges(model)[name], scale, rtol=1e-9, atol=0)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(entry["after"] <= entry["before"] for entry in report.linears.values())
    assert sum(entry["after"] for entry in report.linears.values()) < sum(entry["before"] for entry in report.linears.values())


def test_gptq_rounds_on_the_clipped_grid() -> None:
    model, plain = prepared("LlamaForCausalLM"), prepared("LlamaForCausalLM")
    round_gptq_(model, WINDOWS, GPTQOptions(clip=True))
    round_gptq_(plain, WINDOWS, GPTQOptions())
    first = "model.layers.0.self_attn.q_proj"
    clipped = prepared("LlamaForCausalLM")
    clip_ranges_(clipped, WINDOWS)
    assert torch.equal(ranges(model)[first], ranges(clipped)[first])
    assert not torch.equal(ranges(model)[first], ranges(plain)[first])
    for linear in model.modules():
        if isinstance(linear, QuantizedLinear):
            torch.testing.assert_close(linear.quantized_weight(), linear.weight, rtol=0, atol=1e-12)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = prepared("LlamaForCausalLM")
    clip_ranges_(whole, WINDOWS)

    def stop(done: int, total: int, description: str) -> None:
        raise KeyboardInterrupt

    kept, model = KeptFiles(tmp_path, seconds=0), prepared("LlamaForCausalLM")
    with pytest.raises(KeyboardInterrupt):
        clip_ranges_(model, WINDOWS, kept=kept, progress=stop)
    model = prepared("LlamaForCausalLM")
    clip_ranges_(model, WINDOWS, kept=kept, resume=True)
    assert all(torch.equal(scale, ranges(whole)[name]) for name, scale in ranges(model).items())
