"""Statistics: magnitudes where quantizers see them, and errors that no change of basis can fake."""

from __future__ import annotations

import pytest
import torch

import fptquant as fq
from fptquant.config.quantization import QuantizationConfig
from fptquant.errors import UserError
from fptquant.evaluation.places import PLACES
from fptquant.models.instrument import instrument
from fptquant.reports.statistics import block_errors, collect_activations, map_layers_of, trace_residuals
from fptquant.stages.set_ranges import set_activation_ranges_
from tests.models.tiny import tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

TOKENS = token_ids(1, 24)[0]


def calibrated(*overrides: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    small = ["calibration.windows=2", "calibration.window=32", "local.value_steps=2"]
    config = fq.load_config("fptquant-local", *small, *overrides)
    return model, fq.calibrate(model, tiny_tokenizer(), config, progress=lambda *step: None).model


def test_magnitudes_are_those_of_the_activations() -> None:
    model = tiny_model("LlamaForCausalLM")
    found = collect_activations(model, TOKENS)
    assert list(found) == list(PLACES)
    with torch.no_grad():
        states = model(TOKENS[None], output_hidden_states=True).hidden_states
        inputs = [layer.input_layernorm(state)[0].abs() for layer, state in zip(model.model.layers, states, strict=False)]
    site = found["attn_in"]
    assert site.largest == pytest.approx([float(x.max()) for x in inputs])
    assert site.median == pytest.approx([float(x.median()) for x in inputs])
    assert site.map_layer == max(range(2), key=lambda index: site.largest[index])
    assert site.map is not None
    torch.testing.assert_close(site.map, inputs[site.map_layer])


def test_online_transforms_are_seen_with_and_without_quantizers() -> None:
    for label in ("w4a16", "w4a8kv8-static"):
        model, student = calibrated("quantization=" + label)
        before = collect_activations(model, TOKENS)
        after = collect_activations(student, TOKENS, map_layers=map_layers_of(before))
        assert map_layers_of(after) == map_layers_of(before)
        assert after["down_in"].map is not None
        assert before["down_in"].map is not None
        # An orthonormal transform keeps the norm of a token; T_u scales channels, so only the order of magnitude holds.
        ratio = float(after["down_in"].map.norm() / before["down_in"].map.norm())
        assert 0.2 < ratio < 5
        assert not torch.allclose(after["down_in"].map, before["down_in"].map)
        assert all(len(site.largest) == 2 for site in after.values())


def test_what_quantizers_cut_off_is_seen() -> None:
    model = tiny_model("LlamaForCausalLM")
    before = collect_activations(model, TOKENS)
    part = {"bits": 2, "range": {"method": "mse"}}
    instrument(model, QuantizationConfig.model_validate({"activation": part, "kv_cache": part, "sites": "all"}))
    set_activation_ranges_(model, TOKENS[None])
    logits = model(TOKENS[None]).logits
    after = collect_activations(model, TOKENS)
    for name, site in after.items():
        assert site.largest == pytest.approx(before[name].largest), name
    assert torch.equal(model(TOKENS[None]).logits, logits)


def test_a_rotated_and_rescaled_residual_has_no_error() -> None:
    for extra in ([], ["transforms.residual_scaling={}"]):
        model, student = calibrated("quantization=w16a16", *extra)
        errors = block_errors(trace_residuals(model, TOKENS), trace_residuals(student, TOKENS))
        assert len(errors) == 2
        assert max(errors) < 1e-5


def test_quantization_shows_and_coarser_grids_show_more() -> None:
    worst = []
    for label in ("w8a16", "w4a16", "w2a16"):
        model, student = calibrated("quantization=" + label)
        worst.append(max(block_errors(trace_residuals(model, TOKENS), trace_residuals(student, TOKENS))))
    assert 1e-4 < worst[0] < worst[1] < worst[2]


def test_traces_of_other_texts_are_refused() -> None:
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(UserError, match="cannot be compared"):
        block_errors(trace_residuals(model, TOKENS), trace_residuals(model, TOKENS[:5]))
