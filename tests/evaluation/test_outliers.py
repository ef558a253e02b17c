"""Outlier features and massive activations: their definitions on tensors made by hand, and a model in which one is planted."""

from __future__ import annotations

import math

import pytest
import torch

from fptquant.evaluation.outliers import KEPT, OutlierCounter, PlaceOutliers, find_massive
from fptquant.evaluation.places import PLACES, look_at_windows
from tests.models.prepare import quantized_model, setting
from tests.models.tiny import tiny_model, token_ids


def counted(layers: list[torch.Tensor]) -> PlaceOutliers:
    counter = OutlierCounter()
    for layer, x in enumerate(layers):
        counter.note(0, "attn_in", layer, x[None])
    return counter.finish()["attn_in"]


def test_outlier_features_at_the_borders_of_their_definition() -> None:
    """4 layers of 50 positions: 25 % are one layer, 6 % of all positions are 12."""
    layers = [torch.full((50, 5), 0.5) for _ in range(4)]
    layers[2][:12, 0] = -6.0  # exactly at every border
    layers[2][:11, 1] = 100.0  # 5.5 % of the positions
    layers[2][:, 2] = 5.999  # never 6
    for x in layers:
        x[:3, 3] = 7.0  # 12 positions over all layers
    assert [(each.channel, each.layers, each.positions, each.largest) for each in counted(layers).features] == [
        (3, 1.0, 0.06, 7.0),
        (0, 0.25, 0.06, 6.0),
    ]
    layers.append(torch.zeros(50, 5))  # one of five layers is 20 %, and 15 positions are 6 %
    layers[2][:, 0] = 6.0
    assert not counted(layers).features


def test_shares_are_of_all_windows() -> None:
    counter = OutlierCounter()
    for window in range(10):
        x = torch.ones(1, 10, 2)
        x[0, :, 1] = 8.0 if window == 0 else 1.0
        counter.note(window, "mlp_in", 0, x)
    (feature,) = counter.finish()["mlp_in"].features
    assert (feature.channel, feature.positions) == (1, 0.1)


def test_massive_activations_at_the_borders_of_their_definition() -> None:
    values = torch.full((20, 10), 0.125)
    values[3, 4], values[5, 6] = -125.0, 124.9  # 1,000 times the median, and a little less
    (massive,), number = find_massive(values, window=2, layer=1)
    assert (massive.window, massive.layer, massive.position, massive.channel, number) == (2, 1, 3, 4, 1)
    assert (massive.value, massive.ratio) == (-125.0, 1000.0)
    values = torch.full((20, 10), 0.0625)
    values[3, 4], values[5, 6] = 100.0, 100.5  # both more than 1,000 times the median
    assert [each.position for each in find_massive(values)[0]] == [5]


def test_many_massive_activations_are_counted_and_the_largest_kept() -> None:
    values = torch.zeros(100, 100)
    values[:, :20] = 1000 + torch.arange(2000.0).reshape(100, 20)
    found, number = find_massive(values)
    assert (number, len(found), found[0].value) == (2000, KEPT, 2999.0)
    assert found[0].ratio == math.inf
    counter = OutlierCounter()
    for window in range(2):
        counter.note(window, "attn_in", 0, (values + window)[None])
    place = counter.finish()["attn_in"]
    assert (place.massive_count, len(place.massive)) == (4000, KEPT)
    assert [(each.window, each.value) for each in place.massive[:3]] == [(1, 3000.0), (0, 2999.0), (1, 2999.0)]


def test_a_planted_massive_activation_is_found_at_its_token_and_channel() -> None:
    model = tiny_model("LlamaForCausalLM")
    windows = token_ids(3, 24, seed=5)
    windows[windows == 7] = 8
    windows[1, 13] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 33] = -2e5
    counter = OutlierCounter()
    look_at_windows(model, windows, counter.note)
    found = counter.finish()
    assert list(found) == list(PLACES)
    residual = found["residual_mlp"]
    assert residual.massive_count == 2
    assert [(each.window, each.position, each.channel) for each in residual.massive] == [(1, 13, 33)] * 2
    assert {each.layer for each in residual.massive} == {0, 1}
    assert residual.largest == pytest.approx(2e5, rel=1e-3)
    assert all(each.value == pytest.approx(-2e5, rel=1e-3) for each in residual.massive)
    assert found["attn_in"].massive_count == 0  # the norm has divided it away


def test_quantizers_are_left_out_and_put_back() -> None:
    model, plain = quantized_model("LlamaForCausalLM", setting(2, weight_bits=2)), tiny_model("LlamaForCausalLM")
    windows = token_ids(1, 24)
    found = []
    before = model(windows).logits
    for each in (model, plain):
        counter = OutlierCounter()
        look_at_windows(each, windows, counter.note)
        found.append({place: outliers.largest for place, outliers in counter.finish().items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert torch.equal(model(windows).logits, before)
