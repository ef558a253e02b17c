"""Run-time cost: counted by hand on small models."""

from __future__ import annotations

import pytest
from torch import nn

from fptquant.config.loading import load_config
from fptquant.evaluation.cost import runtime_cost
from fptquant.ops.hadamard import hadamard_additions, hadamard_matrix
from tests.models.tiny import ARCHITECTURES, tiny_model

NOT_CENTERED = ("quantization.activation.centered=false", "quantization.kv_cache.centered=false")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_linears_are_those_of_the_model(architecture: str) -> None:
    model = tiny_model(architecture)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert runtime_cost(model, load_config("rtn")).linears == weights


def test_what_merges_costs_nothing() -> None:
    model = tiny_model("LlamaForCausalLM")
    used = "transforms={query_key_rotation: {}, value_mixing: {}, up_scaling: {}, residual_rotation: {start: random_orthogonal}}"
    cost = runtime_cost(model, load_config("fptquant-local", used, "quantization=w4a16"))
    assert (cost.added, cost.share, cost.scales) == ({}, 0.0, "none")


def test_kronecker_products_cost_the_sum_of_their_sizes_for_each_value() -> None:
    model = tiny_model("LlamaForCausalLM", hidden_size=24, intermediate_size=40)
    heads, head_dim, layers = model.config.num_attention_heads, model.config.head_dim, model.config.num_hidden_layers
    config = load_config("fptquant-local", "transforms={kronecker: {}}", "local.method=none", *NOT_CENTERED)
    expected = layers * (2 * 24 * (4 + 6) + 40 * (5 + 8) + heads * head_dim * heads)
    assert runtime_cost(model, config).added == {"P": expected}


def test_rotations_of_blocks_cost_two_matrices_for_each_value() -> None:
    model = tiny_model("LlamaForCausalLM", hidden_size=24, intermediate_size=40)
    heads, layers = model.config.num_attention_heads * model.config.head_dim, model.config.num_hidden_layers
    config = load_config("fptquant-local", "transforms={block_rotation: {block_size: 8}}", "local.method=none", *NOT_CENTERED)
    assert runtime_cost(model, config).added == {"D": layers * 2 * 8 * (24 + 24 + heads + 40)}


def test_what_is_left_to_do_at_run_time() -> None:
    model = tiny_model("LlamaForCausalLM")
    settings = model.config
    hidden, wide, layers = settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers
    heads, keys = (count * settings.head_dim for count in (settings.num_attention_heads, settings.num_key_value_heads))
    config = load_config(
        "fptquant-local",
        "quantization=w4a4kv4-static",
        "quantization.prefix=[5, 7]",
        "transforms.query_key_hadamard={}",
        "transforms.out_hadamard={}",
    )
    cost = runtime_cost(model, config)
    assert cost.added == {
        "T_d": layers * wide * hadamard_additions(wide),
        "T_h": layers * (heads + keys) * hadamard_additions(settings.head_dim),
        "T_o": layers * heads * hadamard_additions(settings.num_attention_heads),
        "center": layers * (2 * hidden + heads + wide + 2 * keys),
        "S_n": layers * (heads + wide),
        "prefix": layers * 2 * 2 * heads,
    }
    assert cost.share == sum(cost.added.values()) / cost.linears
    assert cost.scales == "static"
    kv = load_config("rtn", "quantization=w4a4kv4-dynamic", "quantization.kv_cache.centered=true")
    assert runtime_cost(model, kv).added == {"center": layers * 2 * keys}
    both = load_config("rtn", "quantization=w4a4-static", "quantization.activation.centered=true")
    assert runtime_cost(model, both).added == {"center": layers * (2 * hidden + heads + wide)}
    biases = load_config("rtn", "quantization=w4a16", "range_training.lr.bias=0.01")
    assert runtime_cost(model, biases).added == {"bias": layers * (3 * hidden + 2 * keys + 2 * wide)}
    had_some = runtime_cost(tiny_model("Qwen2ForCausalLM"), biases)  # of q, k and v
    assert had_some.added == {"bias": layers * (2 * hidden + 2 * wide)}
    output = load_config("fptquant-local", "transforms.residual_scaling.where=output", "transforms.down_hadamard.block_size=8")
    assert runtime_cost(model, output).added["S_n"] == layers * 2 * hidden
    assert runtime_cost(model, output).added["T_d"] == layers * wide * 3


@pytest.mark.parametrize(
    ("overrides", "scales"),
    [
        (["quantization=w4a16"], "none"),
        (["quantization=w4a8-static"], "static"),
        (["quantization=w4a4kv4-dynamic"], "dynamic"),
        (["quantization=w4a8kv8-static", "quantization.kv_cache.dynamic=true"], "dynamic"),
        (["quantization=w4a16", "quantization.overrides={down_in: {bits: 8}}"], "static"),
        (
            ["quantization=w4a16kv8-static", "quantization.activation.dynamic=true", "quantization.overrides={down_in: {bits: 8}}"],
            "dynamic",
        ),
        (["quantization=w4a8kv16-dynamic", "quantization.activation.dynamic=false"], "static"),
    ],
)
def test_scales(overrides: list[str], scales: str) -> None:
    assert runtime_cost(tiny_model("LlamaForCausalLM"), load_config("rtn", *overrides)).scales == scales


@pytest.mark.parametrize("size", [1, 2, 12, 64, 96, 144])
def test_additions_of_a_hadamard_transform(size: int) -> None:
    """No more than a product with the matrix needs, which adds every element of the vector for each of the result."""
    assert hadamard_additions(size) <= max(len(hadamard_matrix(size)), 1)
