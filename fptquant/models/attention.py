"""The attention function ``fptquant``: transforms queries, quantizes them and softmax outputs, which no module boundary shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fptquant.models.context import ForwardContext
from fptquant.models.heads import transform_queries
from fptquant.models.prefix import prefix_keys_values, prepend, put_prefix_first
from fptquant.quantizers.quantizer import Quantizer

ATTENTION_NAME = "fptquant"
"""Name of the attention function in the model library's registry."""


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention with transformed (T_h, P_h) and quantized queries, quantized probabilities, and a prefix before
    the keys and values.

    Without a quantizer of the softmax output this is the library's own ``sdpa``. No quantizer sees the prefix: the
    probabilities of its columns stay in full precision, as its keys and values do.

    Shape: query [B, heads, Tq, head_dim] after RoPE; key, value [B, kv_heads, Tk, head_dim]; attention_mask: bool
        (True = attend) or additive, broadcastable to [B, heads, Tq, Tk], or None for causal; returns [B, Tq, heads,
        head_dim] and the probabilities, where they were computed.
    """
    context = module.context
    assert isinstance(context, ForwardContext)
    query = transform_queries(module, query)
    if isinstance(module.query_quantizer, Quantizer):
        query = module.query_quantizer(query, context.kept_heads(query, module.query_quantizer.full_precision_tokens))
    prefix = prefix_keys_values(module)
    softmax_quantizer = module.softmax_quantizer
    library: Callable[..., tuple[Tensor, Any]] = partial(sdpa_attention_forward, module, dropout=dropout, scaling=scaling, **kwargs)
    fused = not isinstance(softmax_quantizer, Quantizer) or softmax_quantizer.mode == "off"
    # a GPU's kernels for grouped queries without a mask want half precision; else they would keep all scores
    suits = not query.is_cuda or query.dtype in (torch.float16, torch.bfloat16)
    if fused and prefix is not None and attention_mask is None and query.shape[2] > 1 and suits:
        return _causal_behind_prefix(library, prefix, query, key, value), None
    if prefix is not None:
        key, value, attention_mask = put_prefix_first(prefix, query, key, value, attention_mask)
    if fused:
        return library(query, key, value, attention_mask)[0], None
    assert isinstance(softmax_quantizer, Quantizer)
    probabilities = _probabilities(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    kept = context.kept_heads(probabilities, softmax_quantizer.full_precision_tokens)
    length = 0 if prefix is None else prefix[0].shape[1]
    probabilities = _round_text(probabilities, length, softmax_quantizer, kept).to(value.dtype)
    weights = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    output = (_by_kv_head(weights, value.shape[1]) @ value[:, :, None]).flatten(1, 2)
    return output.transpose(1, 2).contiguous(), probabilities


def _round_text(probabilities: Tensor, prefix: int, quantizer: Quantizer, kept: Tensor | None) -> Tensor:
    """Rounds the columns of the text; those of the prefix stay."""
    rounded: Tensor = quantizer(probabilities[..., prefix:], kept)
    return torch.cat([probabilities[..., :prefix], rounded], dim=-1) if prefix else rounded


def _causal_behind_prefix(
    library: Callable[..., tuple[Tensor, Any]], prefix: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Causal attention to a prefix and to the text, without a mask: kernels skip what no query attends to.

    Before the queries stand as many of zeros as the prefix has tokens, whose results are dropped: then it is causal attention over
    prefix and text. The first keys are those of the queries (an empty static cache has more).

    Shape: as `quantized_attention`; returns [B, Tq, heads, head_dim].
    """
    length, queries = prefix[0].shape[1], query.shape[2]
    key, value = (prepend(part, x[:, :, :queries]) for part, x in zip(prefix, (key, value), strict=True))
    return library(nn.functional.pad(query, (0, 0, length, 0)), key, value, None)[0][:, length:]


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """[B, heads, T, any] as [B, kv_heads, group, T, any], so that keys and values need no copy per query head."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Softmax over the keys [B, heads, Tq, Tk] in float32, or float64 for float64 inputs."""
    scores = (_by_kv_head(query, key.shape[1]) @ key[:, :, None].transpose(-1, -2)).flatten(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    # the lowest finite number instead of -inf: a padding token that may attend to nothing gets no NaN
    lowest = torch.finfo(scores.dtype).min
    if mask is None:
        queries, keys = scores.shape[-2:]
        if queries > 1:  # one query alone attends to every key
            future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, lowest)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    else:
        scores = scores + mask
    return scores.softmax(-1)


AttentionInterface.register(ATTENTION_NAME, quantized_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
