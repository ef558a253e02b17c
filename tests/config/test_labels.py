"""Labels: what each stands for, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptquant.config.labels import EXAMPLE_LABELS, canonical_label, expand_label
from fptquant.config.loading import dump_config, load_config
from fptquant.config.quantization import QuantizationConfig
from fptquant.errors import UserError


@pytest.mark.parametrize("label", [*EXAMPLE_LABELS, "w3a8", "w16a16kv4-static", "w2a16kv8-dynamic-g32", "w8a8kv8-static-g128"])
def test_a_setting_knows_its_canonical_label(label: str) -> None:
    parsed = QuantizationConfig.model_validate(expand_label(label))
    assert parsed.label == canonical_label(label)
    assert QuantizationConfig.model_validate(expand_label(parsed.label)) == parsed


def test_parts_of_a_label() -> None:
    parsed = QuantizationConfig.model_validate(expand_label("w4a8kv6-dynamic-g64"))
    assert (parsed.weight.bits, parsed.activation.bits, parsed.kv_cache.bits) == (4, 8, 6)
    assert (parsed.weight.granularity, parsed.weight.group_size) == ("per_group", 64)
    assert parsed.activation.dynamic
    assert (parsed.activation.granularity, parsed.kv_cache.granularity) == ("per_token", "per_token")


def test_a_setting_says_what_a_table_must_mention() -> None:
    given = {**expand_label("w4a4kv4-static"), "full_precision_tokens": 1, "overrides": {"down_in": {"bits": 8}}}
    setting = QuantizationConfig.model_validate(given).setting
    assert setting == "w4a4kv4-static, first 1 token in full precision, down_in at 8 bits"
    given = {**expand_label("w4a4kv4-static"), "overrides": {"o_in": {"full_precision_tokens": 2}}}
    setting = QuantizationConfig.model_validate(given).setting
    assert setting == "w4a4kv4-static, first 2 tokens in full precision at o_in"
    given = expand_label("w4a16kv4-static")
    given["activation"]["centered"] = given["kv_cache"]["centered"] = True
    assert QuantizationConfig.model_validate(given).setting == "w4a16kv4-static, cache centered"


@pytest.mark.parametrize(
    ("label", "prefix", "note"),
    [
        ("w4a8-static", "auto", ", automatic prefix"),
        ("w4a8-static", [1, 2], ", prefix of 2 tokens"),
        ("w4a16", "auto", ""),
        ("w4a16", [1], ", prefix of 1 token"),
        ("w4a16", "<s>", ", prefix '<s>'"),
        ("w16a16", [1], ""),
    ],
)
def test_a_prefix_is_mentioned_where_it_stands(label: str, prefix: str | list[int], note: str) -> None:
    found = QuantizationConfig.model_validate({**expand_label(label), "prefix": prefix})
    assert found.setting == found.label + note
    assert found.has_prefix == bool(note)


@pytest.mark.parametrize("label", ["", "w4", "a4w4", "w4b4", "w4a4-fast", "w4a4-g64-static", "W4A4"])
def test_other_words_are_refused(label: str) -> None:
    with pytest.raises(UserError, match="is not a setting"):
        expand_label(label)


@pytest.mark.parametrize(
    ("label", "shares"),
    [
        ("w4a4kv4-dynamic", (0.9, 0.95)),
        ("w4a8kv4-dynamic", (1.0, 0.95)),
        ("w8a8kv8-dynamic", (1.0, 1.0)),
        ("w4a4kv4-static", (0.9, 0.95)),  # which do not read it
        ("w4a16", (0.9, 0.95)),
    ],
)
def test_grids_of_more_than_4_bits_cover_all_of_a_tokens_range(label: str, shares: tuple[float, float]) -> None:
    for recipe in ("rtn", "fptquant-local"):
        quantization = load_config(recipe, f"quantization={label}").quantization
        assert (quantization.activation.range.clip_ratio, quantization.kv_cache.range.clip_ratio) == shares


def test_a_site_of_other_bits_has_its_own_share() -> None:
    def share(site: str, *overrides: str) -> float | None:
        found = load_config("rtn", *overrides).quantization.overrides[site].range  # type: ignore[index]
        return None if found is None else found.clip_ratio

    assert share("down_in", "quantization=w4a4kv4-dynamic", "quantization.overrides={down_in: {bits: 8}}") == 1.0
    assert share("k_cache", "quantization=w4a8kv8-dynamic", "quantization.overrides={k_cache: {bits: 4}}") == 0.95
    given = "quantization.overrides={down_in: {bits: 8, range: {clip_ratio: auto}}}"
    assert share("down_in", "quantization=w4a4kv4-dynamic", given) == 1.0
    given = given.replace("auto", "0.7")
    assert share("down_in", "quantization=w4a4kv4-dynamic", given) == 0.7
    unread = {"{bits: 8}": "w4a4kv4-static", "{bits: 16}": "w4a4kv4-dynamic", "{full_precision_tokens: 1}": "w4a4kv4-dynamic"}
    for override, setting in unread.items():
        assert share("down_in", f"quantization={setting}", f"quantization.overrides={{down_in: {override}}}") is None


def test_sites_of_other_bits_survive_a_round_trip(tmp_path: Path) -> None:
    overrides = "quantization.overrides={down_in: {bits: 8}, k_cache: {bits: 16}, o_in: {full_precision_tokens: 1}}"
    config = load_config("rtn", "quantization=w4a4kv4-dynamic", overrides)
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "counted"),
    [
        (["quantization=w4a16"], "fisher"),
        (["quantization=w4a8kv8-static"], "equal"),
        (["quantization=w4a4kv4-dynamic"], "equal"),
        (["quantization=w4a16", "quantization.kv_cache.bits=8"], "equal"),
        (["quantization=w4a8kv8-static", "rounding.token_weights=fisher"], "fisher"),
        (["quantization=w4a16", "rounding.token_weights=equal"], "equal"),
    ],
)
def test_tokens_count_by_their_gradients_where_weights_alone_are_quantized(overrides: list[str], counted: str) -> None:
    for recipe in ("fptquant-local-gptq", "fptquant-gptq"):
        assert load_config(recipe, *overrides).rounding.token_weights == counted


def test_a_given_share_of_a_tokens_range_wins() -> None:
    share = "quantization.activation.range.clip_ratio"
    assert load_config("rtn", "quantization=w4a8kv8-dynamic", f"{share}=0.8").quantization.activation.range.clip_ratio == 0.8
    with pytest.raises(UserError, match=share):
        load_config("rtn", "quantization=w4a8kv8-dynamic", f"{share}=wide")
