"""SQNR of quantizers against the formula by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fptquant.evaluation.sqnr import SITES, by_site, quantizer_sqnr
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import view_model
from fptquant.models.instrument import iter_quantizers
from fptquant.quantizers.sites import BLOCK_POINTS
from tests.models.prepare import quantized_model, setting
from tests.models.tiny import token_ids

WINDOWS = token_ids(3, 20, seed=5)


def by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return 10 * math.log10(float(x.square().sum()) / float((x - y).square().sum()))


def test_of_activations_against_the_formula() -> None:
    """The input of the first quantizer is that of the full-precision model; the others meet what is left of theirs."""
    model = quantized_model("LlamaForCausalLM", setting(4, weight_bits=4))
    seen: list[torch.Tensor] = []
    down = view_model(model).blocks[1].down_proj
    handle = down.input_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    found = quantizer_sqnr(model, WINDOWS)
    handle.remove()
    with torch.no_grad():
        norm = model.model.layers[0].input_layernorm
        quantizer = norm.output_quantizer
        quantizer.mode = "off"
        x = norm(model.model.embed_tokens(WINDOWS))
        quantizer.mode = "on"
        assert found["layers.0.attn_in"] == pytest.approx(by_hand(x, quantizer(x)), rel=1e-6)
        given = torch.cat(seen)
        assert found["layers.1.down_in"] == pytest.approx(by_hand(given, down.input_quantizer(given)), rel=1e-6)
    assert set(found) == {name for name, _ in iter_quantizers(model)}
    assert all(0 < value < 60 for value in found.values())


def test_of_weights_against_the_formula() -> None:
    model = quantized_model("Qwen2ForCausalLM", setting(16, weight_bits=3))
    found = quantizer_sqnr(model, WINDOWS)
    assert set(found) == {f"layers.{layer}.{name}.weight" for layer in range(2) for name in LINEAR_NAMES}
    linear = view_model(model).blocks[1].up_proj
    scale = linear.weight_quantizer.scale.reshape(-1, 1)  # type: ignore[union-attr]
    rounded = (linear.weight / scale).round().clamp(-4, 3) * scale
    assert found["layers.1.up_proj.weight"] == pytest.approx(by_hand(linear.weight, rounded), rel=1e-5)


def test_kept_tokens_take_no_part() -> None:
    """A first token in full precision has no error, and its signal would hide that of the others."""
    model = quantized_model("LlamaForCausalLM", setting(4, full_precision_tokens=1))
    found = quantizer_sqnr(model, WINDOWS)
    with torch.no_grad():
        norm = model.model.layers[0].input_layernorm
        norm.output_quantizer.mode = "off"
        x = norm(model.model.embed_tokens(WINDOWS))[:, 1:]
        norm.output_quantizer.mode = "on"
        assert found["layers.0.attn_in"] == pytest.approx(by_hand(x, norm.output_quantizer(x)), rel=1e-6)


def test_more_bits_are_six_decibels_each_and_modes_stay() -> None:
    few, many = (quantized_model("LlamaForCausalLM", setting(bits, weight_bits=bits, dynamic=True)) for bits in (4, 8))
    for _, quantizer in iter_quantizers(few):
        quantizer.mode = "off"
    differences = [value - quantizer_sqnr(few, WINDOWS)[name] for name, value in quantizer_sqnr(many, WINDOWS).items()]
    assert sum(differences) / len(differences) == pytest.approx(4 * 6.02, abs=1.5)
    assert {quantizer.mode for _, quantizer in iter_quantizers(few)} == {"off"}


def test_rounded_weights_have_no_error() -> None:
    model = quantized_model("LlamaForCausalLM", setting(16, weight_bits=4))
    with torch.no_grad():
        for _, linear in view_model(model).blocks[0].linears():
            linear.weight.copy_(linear.quantized_weight())
    found = quantizer_sqnr(model, WINDOWS)
    assert found["layers.0.q_proj.weight"] == math.inf
    assert found["layers.1.q_proj.weight"] < 40


def test_by_site_is_in_the_order_of_the_data_flow() -> None:
    model = quantized_model("LlamaForCausalLM", setting(8, weight_bits=8, sites="all"))
    values = quantizer_sqnr(model, WINDOWS[:1])
    table = by_site(values, 2)
    assert list(table) == list(SITES) == [*BLOCK_POINTS, *(f"{name}.weight" for name in LINEAR_NAMES)]
    assert table["o_in"] == [values["layers.0.o_in"], values["layers.1.o_in"]]
    assert {"embedding_out", "final_norm_out"} < set(values)
