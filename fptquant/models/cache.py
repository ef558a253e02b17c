"""Keys and values are transformed (T_h) and quantized on their way into the cache, so that what is stored was rounded once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fptquant.models.context import ForwardContext
from fptquant.quantizers.quantizer import Quantizer


class QuantizingCache:
    """Stands before the cache of one pass (of any class, or none) and quantizes what attention gives it to store.

    Attention asks a cache for one thing only: to take this pass's keys and values and to return all of them. Working
    there, rather than in a cache class, serves every cache alike (dynamic, static, sliding, offloaded, none at all),
    and the cache that the caller holds is the one that is filled.
    """

    def __init__(
        self, cache: Any, key_quantizer: Quantizer | None, value_quantizer: Quantizer | None, context: ForwardContext
    ) -> None:
        self.cache = cache
        self.key_quantizer = key_quantizer
        self.value_quantizer = value_quantizer
        self.context = context

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Transforms, quantizes, stores and returns the keys and values to attend to.

        Shape: keys (after RoPE) and values of this pass [B, kv_heads, T, head_dim].
        """
        keys = self.context.transform_head(keys)
        if self.key_quantizer is not None:
            keys = self.key_quantizer(keys, self.context.kept_heads(keys, self.key_quantizer.full_precision_tokens))
        if self.value_quantizer is not None:
            values = self.value_quantizer(values, self.context.kept_heads(values, self.value_quantizer.full_precision_tokens))
        if self.cache is None:
            return keys, values
        stored: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        return stored


def quantize_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Forward pre-hook of attention: puts a `QuantizingCache` before the cache. A plain function: survives deepcopy."""
    context = module.context
    assert isinstance(context, ForwardContext)
    key_quantizer, value_quantizer = module.key_quantizer, module.value_quantizer
    assert isinstance(key_quantizer, Quantizer | None)
    assert isinstance(value_quantizer, Quantizer | None)
    cache = QuantizingCache(kwargs.get("past_key_values"), key_quantizer, value_quantizer, context)
    return args, {**kwargs, "past_key_values": cache}
