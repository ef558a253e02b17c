"""Over how many positions calibration windows are spread, by the setting and the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptquant.config.loading import dump_config, load_config, parse_config, read_yaml
from fptquant.config.schema import Config
from fptquant.stages.positions import LONGEST, with_positions
from tests.models.tiny import tiny_model

STATIC = ("quantization=w4a4kv4-static", "calibration.window=16")


@pytest.mark.parametrize(
    ("method", "overrides", "auto"),
    [
        ("rtn", ["quantization=w4a8kv8-static"], True),
        ("rtn", ["quantization=w4a16"], False),
        ("rtn", ["quantization=w4a4kv4-dynamic"], False),
        ("rtn", ["quantization=w4a4kv4-dynamic", "quantization.kv_cache.centered=true"], True),
        ("rtn", ["quantization=w4a8kv8-static", "quantization.kv_cache.bits=16"], False),
        ("rtn", ["quantization=w4a8kv8-static", "quantization.kv_cache.bits=16", "quantization.sites=linears_kv_bmm"], True),
        ("rtn", ["quantization=w4a8kv8-static", "quantization.overrides={k_cache: {bits: 16}}"], False),
        ("fptquant-gptq", ["quantization=w4a4kv4-dynamic"], True),
        ("fptquant-gptq", ["quantization=w4a16"], False),
    ],
)
def test_auto_stays_where_ranges_or_centers_of_keys_come_from_text(method: str, overrides: list[str], auto: bool) -> None:
    assert load_config(method, *overrides, "calibration.context=auto").calibration.context == ("auto" if auto else None)


def positions(config: Config, architecture: str = "LlamaForCausalLM", **options: object) -> int | None:
    return with_positions(tiny_model(architecture, **options), config).calibration.positions


def test_auto_is_no_longer_than_the_context_of_the_model() -> None:
    config = load_config("rtn", *STATIC, "calibration.context=auto")
    assert positions(config, max_position_embeddings=128) == 128
    assert positions(config, max_position_embeddings=16) == 16
    assert positions(config, max_position_embeddings=8192) == LONGEST == 2048
    long = load_config("rtn", *STATIC, "calibration.context=auto", "calibration.window=4096")
    assert positions(long, max_position_embeddings=8192) is None


def test_auto_does_not_spread_windows_where_their_place_matters() -> None:
    stretched = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert positions(load_config("rtn", *STATIC, "calibration.context=auto"), rope_parameters=stretched) is None


def test_a_number_and_null_stay() -> None:
    assert positions(load_config("rtn", *STATIC, "calibration.context=40"), max_position_embeddings=128) == 40
    assert positions(load_config("rtn", *STATIC, "calibration.context=null"), max_position_embeddings=128) is None


def test_a_written_config_says_the_same(tmp_path: Path) -> None:
    for setting in ("w4a4kv4-static", "w4a16"):
        config = load_config("rtn", f"quantization={setting}", "calibration.context=auto")
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        assert parse_config(read_yaml(path)) == config
