"""Queries and keys after RoPE: what transforms them in each attention module (T_h, P_h)."""

from __future__ import annotations

from torch import Tensor, nn

from fptquant.models.context import ForwardContext
from fptquant.transforms import QueryKeyHadamard, QueryKeyMixing

HeadTransform = QueryKeyHadamard | QueryKeyMixing


def transform_keys(module: nn.Module, keys: Tensor) -> Tensor:
    """The keys [..., D] of an attention module, transformed unless this pass leaves that out."""
    for transform in _used(module):
        keys = transform(keys)
    return keys


def transform_queries(module: nn.Module, queries: Tensor) -> Tensor:
    """The queries [..., D], so that their products with the transformed keys are what they were."""
    for transform in _used(module):
        queries = transform.forward_query(queries)
    return queries


def _used(module: nn.Module) -> tuple[HeadTransform, ...]:
    online, context = module.online, module.context
    assert isinstance(online, tuple)
    assert isinstance(context, ForwardContext)
    return () if context.full_precision else online
