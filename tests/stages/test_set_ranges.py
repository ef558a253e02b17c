"""Static ranges: gradients pass through a model that has them."""

from __future__ import annotations

import pytest

from fptquant.config.quantization import QuantizationConfig
from fptquant.models.instrument import instrument, iter_quantizers
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from tests.models.tiny import tiny_model, token_ids


@pytest.mark.parametrize("method", ["min_max", "percentile", "lp"])
def test_gradients_pass_through_a_model_with_ranges(method: str) -> None:
    model, part = tiny_model("LlamaForCausalLM"), {"bits": 8, "range": {"method": method}}
    quantization = {"weight": part, "activation": part, "kv_cache": part, "sites": "all"}
    instrument(model, QuantizationConfig.model_validate(quantization), residual_scaling="input")
    set_weight_ranges_(model)
    set_activation_ranges_(model, token_ids(2, 12))
    assert not any(quantizer.scale.is_inference() for _, quantizer in iter_quantizers(model))
    model(token_ids()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
