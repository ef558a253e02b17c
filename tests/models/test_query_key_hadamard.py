"""T_h in a model: the function stays, with every cache and behind a prefix, and what is quantized is transformed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import fptquant as fq
from fptquant.config.quantization import QuantizationConfig
from fptquant.models.architectures import view_model
from fptquant.models.instrument import get_context, instrument
from fptquant.models.norm import widen_norms_
from fptquant.models.prefix import compute_prefix_
from fptquant.transforms import QueryKeyHadamard
from tests.models.prepare import set_ranges, setting
from tests.models.tiny import ARCHITECTURES, SLIDING, given, tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

PREFIX = [17, 5, 90]
BOUNDS = {torch.bfloat16: 0.05, torch.float32: 5e-6, torch.float64: 1e-12}
"""Largest relative error of the logits: some tens of roundings of each dtype."""


def model_of(
    architecture: str, dtype: torch.dtype = torch.float64, *, transformed: bool, prefix: bool = False, **options: Any
) -> PreTrainedModel:
    """Prepared, quantizers off."""
    model = tiny_model(architecture, dtype=dtype, **options)
    widen_norms_(model)
    instrument(model, setting(prefix=PREFIX if prefix else None), query_key_hadamard=transformed)
    if prefix:
        compute_prefix_(model, PREFIX)
    return model


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **inputs).logits
    return found.double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prefix", [False, True])
def test_the_function_stays_and_more_exactly_in_wider_dtypes(architecture: str, prefix: bool) -> None:
    errors = []
    for dtype, bound in BOUNDS.items():
        plain, transformed = (model_of(architecture, dtype, transformed=which, prefix=prefix) for which in (False, True))
        expected = logits(plain, token_ids())
        errors.append(float((logits(transformed, token_ids()) - expected).abs().max() / expected.abs().max()))
        assert errors[-1] < bound
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("architecture", SLIDING)
@pytest.mark.parametrize("prefix", [False, True])
def test_decoding_over_a_sliding_window(architecture: str, prefix: bool) -> None:
    model, ids = model_of(architecture, transformed=True, prefix=prefix, **SLIDING[architecture]), token_ids(2, 9)
    plain, cache = (
        model_of(architecture, transformed=False, prefix=prefix, **SLIDING[architecture]),
        DynamicCache(config=model.config),
    )
    expected = logits(plain, ids)
    parts = [logits(model, part, **given(cache), use_cache=True) for part in (ids[:, :4], *ids[:, 4:].split(1, 1))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-11)


def test_the_cache_holds_transformed_keys_on_their_grid() -> None:
    plain, model = (model_of("LlamaForCausalLM", transformed=which) for which in (False, True))
    ids = token_ids(1, 20)
    caches = [DynamicCache(), DynamicCache()]
    for one, cache in zip((plain, model), caches, strict=True):
        logits(one, ids, **given(cache), use_cache=True)
    expected = QueryKeyHadamard(16)(caches[0].layers[1].keys)
    torch.testing.assert_close(caches[1].layers[1].keys, expected, rtol=0, atol=1e-12)
    set_ranges(model, ids)
    logits(model, ids, **given(cache := DynamicCache()), use_cache=True)
    quantizer = view_model(model).blocks[0].attention.key_quantizer
    keys = cache.layers[0].keys
    assert torch.equal(quantizer(keys), keys)  # type: ignore[operator]
    assert not torch.equal(keys, caches[1].layers[0].keys)


def test_an_outlier_of_keys_is_spread() -> None:
    """One loud RoPE pair of the keys in every head: 4 bits for each token leave more of the others when it is spread."""
    errors = []
    for transformed in (False, True):
        model = tiny_model("LlamaForCausalLM", dtype=torch.float64, rope_theta=1e9)
        for block in view_model(model).blocks:
            block.k_proj.weight.data[7::16] *= 6
            block.k_proj.weight.data[15::16] *= 6
            block.q_proj.weight.data[7::16] /= 6
            block.q_proj.weight.data[15::16] /= 6
        keys = {"kv_cache": {"bits": 4, "dynamic": True}, "overrides": {"v_cache": {"bits": 16}}}
        quantization = QuantizationConfig.model_validate(keys)
        expected = logits(model, token_ids(2, 20))
        instrument(model, quantization, query_key_hadamard=transformed)
        set_ranges(model, token_ids(2, 20))
        errors.append(float((logits(model, token_ids(2, 20)) - expected).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_a_teacher_pass_leaves_it_out() -> None:
    model = model_of("LlamaForCausalLM", transformed=True)
    cache = DynamicCache()
    with get_context(model).teacher():
        logits(model, token_ids(1, 5), **given(cache), use_cache=True)
    logits(model_of("LlamaForCausalLM", transformed=False), token_ids(1, 5), **given(plain := DynamicCache()), use_cache=True)
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)


@pytest.mark.filterwarnings("ignore:the held-out divergence", "ignore:end-to-end training did not lower")
@pytest.mark.parametrize("training", [False, True])
def test_a_calibration_with_it_can_be_saved(tmp_path: Any, training: bool) -> None:
    options = ["training={steps: 2, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1}"] if training else []
    small = ["calibration.windows=2", "calibration.window=40", "local.value_steps=5", "quantization.prefix=[1]"]
    chosen = fq.load_config(
        "fptquant-local", "quantization.label=w4a4kv4-static", "transforms.query_key_hadamard=true", *small, *options
    )
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    result = fq.calibrate(model, tiny_tokenizer(), chosen, progress=lambda *_: None)
    assert not result.fully_mergeable
    assert any(entry["symbol"] == "T_h" for entry in result.transforms.describe())
    result.save(tmp_path / "out")
    loaded, _ = fq.load_calibrated(tmp_path / "out")
    assert all(block.attention.online for block in view_model(loaded).blocks)
    assert torch.equal(logits(loaded, token_ids(1, 30)), logits(result.model, token_ids(1, 30)))


@pytest.mark.parametrize("options", [{"transformed": True}, {"transformed": False, "prefix": True}], ids=["T_h", "prefix"])
def test_another_attention_function_is_refused(options: dict[str, bool]) -> None:
    """It would see transformed keys beside queries as they were, or no prefix."""
    model = model_of("LlamaForCausalLM", **options)
    expected = logits(model, token_ids())
    model.set_attn_implementation("sdpa")
    with pytest.raises(fq.UserError, match=r"changed to sdpa.*set_attn_implementation\(\"fptquant\"\)"):
        logits(model, token_ids())
    model.set_attn_implementation("fptquant")
    assert torch.equal(logits(model, token_ids()), expected)
