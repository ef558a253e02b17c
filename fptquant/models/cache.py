"""Keys and values are transformed (T_h, P_h) and quantized on their way into the cache, so that what is stored was rounded once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fptquant.models.cache_argument import CACHE_ARGUMENTS, cache_argument, given_cache
from fptquant.models.context import ForwardContext
from fptquant.models.heads import transform_keys
from fptquant.quantizers.quantizer import Quantizer


class QuantizingCache:
    """Stands before the cache of one pass (of any class, or none) and quantizes what attention gives it to store.

    Attention asks a cache for one thing only: to take this pass's keys and values and to return all of them. Working
    there, rather than in a cache class, serves every cache alike (dynamic, static, sliding, offloaded, none at all),
    and the cache that the caller holds is the one that is filled.
    """

    def __init__(self, cache: Any, attention: nn.Module) -> None:
        self.cache = cache
        self.attention = attention

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Transforms, quantizes, stores and returns the keys and values to attend to.

        Shape: keys (after RoPE) and values of this pass [B, kv_heads, T, head_dim].
        """
        keys = transform_keys(self.attention, keys)
        keys, values = self._quantize("key", keys), self._quantize("value", values)
        if self.cache is None:
            return keys, values
        stored: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        return stored

    def _quantize(self, which: str, x: Tensor) -> Tensor:
        quantizer, context = getattr(self.attention, f"{which}_quantizer"), self.attention.context
        assert isinstance(quantizer, Quantizer | None)
        assert isinstance(context, ForwardContext)
        return x if quantizer is None else quantizer(x, context.kept_heads(x, quantizer.full_precision_tokens))


def quantize_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Forward pre-hook of attention: puts a `QuantizingCache` before the cache. A plain function: survives deepcopy."""
    others = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
    return args, {**others, cache_argument(type(module)): QuantizingCache(given_cache(kwargs), module)}
