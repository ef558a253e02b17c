"""Static ranges: gradients pass through a model that has them."""

from __future__ import annotations

import copy

import pytest
import torch

from fptquant.config.quantization import QuantizationConfig
from fptquant.config.schema import CalibrationConfig
from fptquant.models.instrument import instrument, iter_quantizers
from fptquant.models.prefix import shift_keys
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


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}])
@pytest.mark.parametrize("kept", [0, 1])
def test_keys_get_the_ranges_of_the_positions_at_which_their_windows_stand(options: dict[str, int], kept: int) -> None:
    part, windows, places = {"bits": 8, "range": {"method": "min_max"}}, token_ids(2, 12), (3, 40)
    quantization = {"activation": part, "kv_cache": part, "full_precision_tokens": kept}
    plain = tiny_model("MistralForCausalLM" if options else "LlamaForCausalLM", dtype=torch.float64, **options)
    instrument(plain, QuantizationConfig.model_validate(quantization))
    moved, keys = copy.deepcopy(plain), {}
    for name, quantizer in iter_quantizers(plain):
        if name.endswith("k_cache"):
            quantizer.register_forward_pre_hook(lambda _, args, name=name: keys.setdefault(name, []).append(args[0]))
    set_activation_ranges_(plain, windows)
    set_activation_ranges_(moved, windows, first_position=places.__getitem__)
    frequencies = plain.model.rotary_emb.inv_freq
    for (name, quantizer), (_, other) in zip(iter_quantizers(moved), iter_quantizers(plain), strict=True):
        expected = other.scale
        if name in keys:  # [1, heads, T, D] for each window
            moved_keys = [shift_keys(x, frequencies, place) for x, place in zip(keys[name], places, strict=True)]
            change = _width(moved_keys, kept) / _width(keys[name], kept)
            assert (change - 1).abs().max() > 1e-2
            expected = other.scale.flatten() * change
        if quantizer.scale is not None:
            torch.testing.assert_close(quantizer.scale.flatten().double(), expected.flatten().double(), rtol=1e-5, atol=0)


def _width(windows: list[torch.Tensor], kept: int) -> torch.Tensor:
    """From the lowest to the highest value of each head, 0 included, in windows [1, heads, T, D] without their first tokens."""
    x = torch.cat(windows)[:, :, kept:].transpose(0, 1).flatten(1)
    return x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)


def test_windows_are_spread_over_the_context() -> None:
    def places(**given: int | None) -> list[int]:
        chosen = CalibrationConfig.model_validate({"windows": 4, "window": 16, **given})
        return [chosen.first_position(window) for window in range(chosen.windows)]

    assert places() == places(context=16) == [0, 0, 0, 0]
    assert places(context=47) == [0, 10, 20, 31]
    assert places(context=64, windows=1) == [0]
