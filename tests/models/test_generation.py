"""Quantized models generate with any cache what they generate without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from fptquant.models.instrument import set_modes
from tests.models.prepare import quantized_model, setting
from tests.models.tiny import ARCHITECTURES, SLIDING, given, tiny_model, token_ids

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)

SETTINGS: dict[str, dict[str, Any]] = {
    "static": {"bits": 5},
    "dynamic": {"bits": 5, "dynamic": True},
    "static_kept": {"bits": 5, "full_precision_tokens": 3},
    "dynamic_kept": {"bits": 5, "dynamic": True, "full_precision_tokens": 3},
    "everywhere": {"bits": 6, "sites": "all", "full_precision_tokens": 1, "weight_bits": 5},
    # products of values that were rounded before: exact ties, were the scales not stretched
    "dynamic_everywhere": {"bits": 4, "sites": "all", "dynamic": True},
    "dynamic_everywhere_kept": {"bits": 6, "sites": "all", "dynamic": True, "full_precision_tokens": 1, "weight_bits": 4},
}
SCALED = ("everywhere", "dynamic_everywhere_kept")
NEW_TOKENS = 10


def make(architecture: str, name: str, *, sliding: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    options = {"dtype": dtype, **(SLIDING.get(architecture, {}) if sliding else {})}
    transforms: dict[str, Any] = {"residual_scaling": "input"} if name in SCALED else {}
    return quantized_model(architecture, setting(**SETTINGS[name]), options=options, **transforms)


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    result: Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
    return result


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_cache_changes_no_token(architecture: str, name: str, sliding: bool) -> None:
    model = make(architecture, name, sliding=sliding)
    ids = token_ids(3, 7)
    expected = generate(model, ids, use_cache=False)
    assert expected.shape == (3, 7 + NEW_TOKENS)
    assert torch.equal(generate(model, ids, use_cache=True), expected)
    assert torch.equal(generate(model, ids, **given(DynamicCache(config=model.config))), expected)
    assert torch.equal(generate(model, ids, **given(DynamicCache())), expected) or sliding
    static = StaticCache(config=model.config, max_cache_len=7 + NEW_TOKENS)
    assert torch.equal(generate(model, ids, **given(static)), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_left_padding_changes_no_token(architecture: str, name: str) -> None:
    model = make(architecture, name)
    long, short = token_ids(1, 9), token_ids(1, 5, seed=4)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    mask = (padded != 0).long()
    for use_cache in (False, True):
        both = generate(model, padded, attention_mask=mask, use_cache=use_cache)
        assert torch.equal(both[:1], generate(model, long, use_cache=use_cache))
        assert torch.equal(both[1:, 4:], generate(model, short, use_cache=use_cache))
    static = StaticCache(config=model.config, max_cache_len=9 + NEW_TOKENS)
    assert torch.equal(generate(model, padded, attention_mask=mask, **given(static)), both)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
def test_decoding_gives_the_logits_of_one_pass(architecture: str, name: str, cache_class: str, sliding: bool) -> None:
    # float64, because in float32 a rounding error may move a value across the middle between two steps of a grid
    model = make(architecture, name, sliding=sliding, dtype=torch.float64)
    ids = token_ids(2, 14)
    cache = DynamicCache(config=model.config) if cache_class == "dynamic" else StaticCache(model.config, 14)
    with torch.no_grad():
        expected = model(ids).logits
        parts = [model(ids[:, :6], **given(cache), use_cache=True).logits]
        parts += [model(ids[:, t : t + 1], **given(cache), use_cache=True).logits for t in range(6, 14)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-6, atol=1e-6)


def test_decoding_in_float32(architecture: str) -> None:
    model = make(architecture, "static_kept")
    ids = token_ids(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits
        logits = torch.cat([model(ids[:, t : t + 1], **given(cache)).logits for t in range(8)], dim=1)
    error = (logits - expected).norm() / expected.norm()
    assert error < 1e-5


def test_cache_holds_quantized_values(architecture: str) -> None:
    model = make(architecture, "static_kept")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(2, 9), **given(cache))
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        for stored, quantizer in ((layer.keys, "key_quantizer"), (layer.values, "value_quantizer")):
            scale = getattr(block.self_attn, quantizer).scale.reshape(1, -1, 1, 1)
            steps = stored / scale
            off_grid = (steps - steps.round()).abs()
            assert off_grid[:, :, 3:].max() < 1e-4
            assert off_grid[:, :, :3].max() > 1e-2  # the kept tokens


def test_kept_tokens_are_in_full_precision(architecture: str) -> None:
    plain = tiny_model(architecture)
    model = make(architecture, "everywhere")
    set_modes(model, "off", "weight")
    model_all = quantized_model(architecture, setting(4, sites="all", full_precision_tokens=5))
    ids = token_ids(2, 9)
    with torch.no_grad():
        expected = plain(ids).logits
        one, five = model(ids).logits, model_all(ids).logits
    torch.testing.assert_close(one[:, :1], expected[:, :1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(five[:, :5], expected[:, :5], rtol=1e-4, atol=1e-4)
    assert (one[:, 1:] - expected[:, 1:]).abs().mean() > 1e-3
    assert (five[:, 5:] - expected[:, 5:]).abs().mean() > 1e-2


def test_left_padding_without_position_ids_keeps_the_first_real_tokens(architecture: str) -> None:
    model = quantized_model(architecture, setting(4, full_precision_tokens=2))
    plain = tiny_model(architecture)
    ids = token_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    with torch.no_grad():
        result, expected = model(padded, attention_mask=mask).logits, plain(padded, attention_mask=mask).logits
    torch.testing.assert_close(result[:, 3:5], expected[:, 3:5], rtol=1e-4, atol=1e-4)
    assert (result[:, 5:] - expected[:, 5:]).abs().mean() > 1e-2


def test_embeddings_as_input(architecture: str) -> None:
    model = make(architecture, "static_kept")
    ids = token_ids()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_copy_generates_the_same(architecture: str) -> None:
    model = make(architecture, "everywhere")
    copied = copy.deepcopy(model)
    expected = generate(model, token_ids())
    set_modes(model, "off")
    assert torch.equal(generate(copied, token_ids()), expected)


def test_beam_search_and_sampling_run(architecture: str) -> None:
    model = make(architecture, "everywhere")
    ids = token_ids()
    assert model.generate(ids, num_beams=2, do_sample=False, max_new_tokens=4, pad_token_id=0).shape[1] == 16
    torch.manual_seed(0)
    assert model.generate(ids, do_sample=True, max_new_tokens=4, pad_token_id=0).shape[1] == 16
