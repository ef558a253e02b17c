"""The attention function equals the library's own, and quantizes queries and probabilities by their rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fptquant.models.attention import quantized_attention
from fptquant.models.context import ForwardContext
from fptquant.quantizers.grid import IntegerGrid, PerTensor
from fptquant.quantizers.quantizer import Quantizer
from tests.models.prepare import setting
from tests.models.tiny import tiny_model, token_ids


def attention(query_quantizer: Quantizer | None = None, softmax_quantizer: Quantizer | None = None) -> Any:
    """What the function reads from an attention module."""
    return SimpleNamespace(
        context=ForwardContext(),
        prefix=None,
        online=(),
        query_quantizer=query_quantizer,
        softmax_quantizer=softmax_quantizer,
        num_key_value_groups=2,
        training=False,
        is_causal=True,
    )


def quantizer(bits: int = 8) -> Quantizer:
    return Quantizer(IntegerGrid(bits, symmetric=False), PerTensor(), dynamic=True)


def inputs(queries: int = 5, keys: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return query, key, value


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    window = causal & causal.flip(-1, -2).roll(1, -1) if queries == keys else causal
    additive = torch.zeros(1, 1, queries, keys, dtype=torch.float64).masked_fill(~causal, -1e30)
    return {"none": None, "bool": causal, "window": window | torch.eye(queries, keys, dtype=torch.bool), "add": additive}


@pytest.mark.parametrize("mask", ["none", "bool", "window", "add"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (5, 9)])
def test_own_path_equals_the_library(mask: str, queries: int, keys: int) -> None:
    softmax = quantizer()
    softmax.mode = "observe_range"  # takes the path with explicit probabilities, and rounds nothing
    module = attention(softmax_quantizer=softmax)
    chosen = masks(queries, keys)[mask]
    query, key, value = inputs(queries, keys)
    expected, _ = sdpa_attention_forward(module, query, key, value, chosen, scaling=0.3)
    output, probabilities = quantized_attention(module, query, key, value, chosen, scaling=0.3)
    assert probabilities is not None
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, queries, dtype=torch.float64))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_query_alone_takes_the_library_path() -> None:
    queries = quantizer(4)
    queries.mode = "on"
    query, key, value = inputs()
    module = attention(query_quantizer=queries)
    output, probabilities = quantized_attention(module, query, key, value, None, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, queries(query), key, value, None, scaling=0.3)
    assert probabilities is None
    assert torch.equal(output, expected)


def test_rows_of_kept_tokens_keep_their_precision() -> None:
    softmax = quantizer(2)
    softmax.mode = "on"
    module = attention(softmax_quantizer=softmax)
    query, key, value = inputs()
    exact, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    softmax.full_precision_tokens = 1
    module.context.begin(torch.tensor([[3, 4, 0, 1, 2]]))
    output, _ = quantized_attention(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(output[:, 2], exact[:, 2], rtol=1e-12, atol=1e-12)
    assert (output[:, 3] - exact[:, 3]).abs().max() > 1e-2


def test_dropout_acts_in_training_only() -> None:
    softmax = quantizer()
    softmax.mode = "observe_range"
    module = attention(softmax_quantizer=softmax)
    query, key, value = inputs()
    calm, _ = quantized_attention(module, query, key, value, None, dropout=0.5)
    module.training = True
    torch.manual_seed(0)
    shaken, _ = quantized_attention(module, query, key, value, None, dropout=0.5)
    assert not torch.equal(calm, shaken)


def test_a_row_without_any_key_stays_finite() -> None:
    softmax = quantizer()
    softmax.mode = "on"
    query, key, value = inputs(dtype=torch.float32)
    nothing = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    output, _ = quantized_attention(attention(softmax_quantizer=softmax), query, key, value, nothing)
    assert torch.isfinite(output).all()


def test_the_library_keeps_its_own_function_unless_needed() -> None:
    from fptquant.models.instrument import instrument

    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting(8, sites="linears_kv"))
    assert model.config._attn_implementation == "sdpa"
    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting(8, sites="linears_kv_bmm"))
    assert model.config._attn_implementation == "fptquant"
    assert model(token_ids()).logits.shape == (2, 12, 101)
