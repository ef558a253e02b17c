"""Site sets grow by the points they are said to grow by, and every point gets the quantizer its config describes."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from fptquant.config import quantization
from fptquant.config.quantization import QuantizationConfig
from fptquant.errors import UserError
from fptquant.quantizers.grid import PerChannel, PerGroup, PerTensor, PerToken
from fptquant.quantizers.sites import (
    CACHE_POINTS,
    HEAD_AXIS_POINTS,
    HEAD_CHANNEL_POINTS,
    POINTS,
    SITE_SETS,
    kind_of,
    point_specs,
    weight_spec,
)


def config(**options: Any) -> QuantizationConfig:
    return QuantizationConfig.model_validate(options)


EIGHT = {"activation": {"bits": 8}, "kv_cache": {"bits": 6}}


def test_sets_agree_with_the_config() -> None:
    assert {name: set(points) for name, points in SITE_SETS.items()} == {
        name: set(points) for name, points in quantization.SITE_SETS.items()
    }
    assert set(POINTS) == set(quantization.SitePoint.__args__)  # type: ignore[attr-defined]
    assert set(quantization.CACHE_SITES) == CACHE_POINTS


def test_sets_are_nested() -> None:
    sets = list(SITE_SETS.values())
    assert all(small < large for small, large in pairwise(sets))
    assert [len(points) for points in sets] == [6, 8, 17, 20]
    assert sets[-1] == set(POINTS)


@pytest.mark.parametrize("sites", list(SITE_SETS))
def test_points_of_a_set(sites: str) -> None:
    specs = point_specs(config(sites=sites, **EIGHT))
    assert specs.keys() == SITE_SETS[sites]
    for point, spec in specs.items():
        assert spec.bits == (6 if point in CACHE_POINTS else 8)
        assert spec.granularity == (PerChannel(1) if point in CACHE_POINTS else PerTensor())
        assert not spec.symmetric
        assert not spec.dynamic


def test_dynamic_is_per_token() -> None:
    specs = point_specs(config(activation={"bits": 4, "dynamic": True}, kv_cache={"bits": 4, "dynamic": True}))
    assert {spec.granularity for spec in specs.values()} == {PerToken()}
    assert all(spec.dynamic for spec in specs.values())


def test_sixteen_bits_mean_no_quantizer() -> None:
    assert point_specs(config(sites="all")) == {}
    assert point_specs(config(activation={"bits": 8})).keys() == SITE_SETS["linears_kv"] - CACHE_POINTS
    assert point_specs(config(kv_cache={"bits": 8})).keys() == CACHE_POINTS
    assert weight_spec(config()) is None


def test_overrides() -> None:
    overrides = {
        "down_in": {"bits": 4, "symmetric": True},
        "attn_in": {"bits": 16},
        "q": {"bits": 5},
        "o_in": {"range": {"method": "lp", "p": 3.0}},
    }
    specs = point_specs(config(overrides=overrides, **EIGHT))
    assert specs.keys() == (SITE_SETS["linears_kv"] - {"attn_in"}) | {"q"}
    assert (specs["down_in"].bits, specs["down_in"].symmetric) == (4, True)
    assert specs["q"].bits == 5
    assert specs["o_in"].bits == 8
    assert (specs["o_in"].range_method.method, specs["o_in"].range_method.p) == ("lp", 3.0)


def test_static_ranges_per_head_and_per_group() -> None:
    sites = {"q", "k_cache", "v_cache", "softmax_out", "q_out", "k_out", "v_out", "o_in"}
    assert set(quantization.HEAD_SITES) == HEAD_AXIS_POINTS | HEAD_CHANNEL_POINTS == sites
    overrides: dict[str, Any] = {site: {"granularity": "per_head"} for site in sites}
    overrides["k_cache"] = {"granularity": "per_group", "group_size": 8}
    overrides["mlp_in"] = {"granularity": "per_tensor"}
    activation = {"bits": 8, "granularity": "per_group", "group_size": 32}
    specs = point_specs(config(sites="all", overrides=overrides, activation=activation, kv_cache={"bits": 8}), 64)
    shared = {point: (spec.granularity, spec.group_size) for point, spec in specs.items()}
    for point in HEAD_AXIS_POINTS - {"k_cache"}:
        assert shared.pop(point) == (PerChannel(1), None)
    for point in HEAD_CHANNEL_POINTS:
        assert shared.pop(point) == (PerTensor(), 64)
    assert shared.pop("k_cache") == (PerTensor(), 8)
    assert shared.pop("mlp_in") == (PerTensor(), None)
    assert set(shared.values()) == {(PerTensor(), 32)}
    assert specs["k_cache"].build("x").granularity == PerChannel(1)


def test_granularities_that_a_point_cannot_have() -> None:
    for site, override in (
        ("down_in", {"granularity": "per_head"}),
        ("softmax_out", {"granularity": "per_group", "group_size": 4}),
    ):
        with pytest.raises(UserError, match=f"{site} cannot have ranges per_"):
            point_specs(config(sites="all", overrides={site: override}, **EIGHT))
    dynamic = config(overrides={"down_in": {"granularity": "per_head"}}, activation={"bits": 8, "dynamic": True})
    assert point_specs(dynamic)["down_in"].granularity == PerToken()


def test_an_override_keeps_its_own_number_of_tokens() -> None:
    overrides = {"down_in": {"full_precision_tokens": 2}, "k_cache": {"full_precision_tokens": 0}}
    specs = point_specs(config(overrides=overrides, full_precision_tokens=1, **EIGHT))
    kept = {point: spec.build(point).full_precision_tokens for point, spec in specs.items()}
    assert kept == {"attn_in": 1, "mlp_in": 1, "o_in": 1, "v_cache": 1, "down_in": 2, "k_cache": 0}


def test_an_override_that_acts_on_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"overrides\.q: this site is not in the set linears_kv"):
        point_specs(config(overrides={"q": {"symmetric": True}}, **EIGHT))


def test_unknown_points_and_sets_are_refused() -> None:
    known = config(**EIGHT)
    fields = {name: getattr(known, name) for name in ("activation", "kv_cache", "sites", "overrides", "full_precision_tokens")}
    wrong: Any = SimpleNamespace(**(fields | {"overrides": {"down_inn": SimpleNamespace(bits=8)}}))
    with pytest.raises(UserError, match=r"unknown site down_inn; did you mean down_in\?"):
        point_specs(wrong)
    wrong = SimpleNamespace(**(fields | {"sites": "some"}))
    with pytest.raises(UserError, match="unknown site set some; choose one of linears_kv"):
        point_specs(wrong)


def test_weights() -> None:
    spec = weight_spec(config(weight={"bits": 4, "range": {"method": "mse", "candidates": 11}}))
    assert spec is not None
    assert (spec.bits, spec.symmetric, spec.granularity) == (4, True, PerChannel(0))
    assert (spec.range_method.method, spec.range_method.candidates) == ("mse", 11)
    grouped = weight_spec(config(weight={"bits": 4, "granularity": "per_group", "group_size": 32}))
    assert grouped is not None
    assert grouped.granularity == PerGroup(32)


def test_build_names_the_quantizer() -> None:
    quantizer = point_specs(config(**EIGHT))["k_cache"].build("layers.2.k_cache")
    assert (quantizer.name, quantizer.grid.bits, quantizer.mode) == ("layers.2.k_cache", 6, "off")
    assert kind_of(quantizer.name) == "kv_cache"
