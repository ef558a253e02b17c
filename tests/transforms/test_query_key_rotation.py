"""T_k: scores are invariant through RoPE; keys and queries turn alike; merged is online."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.transforms import QueryKeyRotation
from fptquant.transforms.base import generator
from fptquant.transforms.query_key_rotation import PairConstraint

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def rotation(constraint: PairConstraint = "none") -> QueryKeyRotation:
    transform = QueryKeyRotation(KV_HEADS, HEAD_DIM, constraint=constraint)
    transform.randomize_(generator(0))
    return transform.requires_grad_(False)


def rope(x: Tensor, base: float = 1e4) -> Tensor:
    """Rotary embedding of [tokens, heads, head_dim] in the layout of pairs (i, i + head_dim / 2)."""
    half = HEAD_DIM // 2
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    q, k = rope(queries.reshape(-1, HEADS, HEAD_DIM)), rope(keys.reshape(-1, KV_HEADS, HEAD_DIM))
    return torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV_HEADS, 1))


@pytest.mark.parametrize("constraint", get_args(PairConstraint))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_scores_after_rope_are_unchanged(dtype: torch.dtype, bound: float, constraint: PairConstraint) -> None:
    rng, transform = generator(1), rotation(constraint)
    queries = torch.randn(5, HEADS * HEAD_DIM, generator=rng, dtype=dtype)
    keys = torch.randn(5, KV_HEADS * HEAD_DIM, generator=rng, dtype=dtype)
    difference = scores(transform.forward_query(queries), transform(keys)) - scores(queries, keys)
    assert float(difference.abs().max()) < bound
    assert float((transform(keys) - keys).abs().max()) > 0.1


def test_inverse_undoes_forward() -> None:
    transform, keys = rotation(), torch.randn(3, 4, KV_HEADS * HEAD_DIM, dtype=torch.float64)
    torch.testing.assert_close(transform.inverse(transform(keys)), keys, rtol=0, atol=1e-14)


@pytest.mark.parametrize("constraint", get_args(PairConstraint))
@pytest.mark.parametrize("side", ["key", "query"])
def test_merged_is_online_with_bias(side: str, constraint: PairConstraint) -> None:
    rng, transform = generator(2), rotation(constraint)
    rows = (KV_HEADS if side == "key" else HEADS) * HEAD_DIM
    weight = torch.randn(rows, 7, generator=rng, dtype=torch.float64)
    bias, x = torch.randn(rows, generator=rng, dtype=torch.float64), torch.randn(5, 7, generator=rng, dtype=torch.float64)
    merged = torch.nn.functional.linear(x, transform.merge_into(weight, side), transform.merge_into(bias, side))
    online = torch.nn.functional.linear(x, weight, bias)
    online = transform(online) if side == "key" else transform.forward_query(online)
    torch.testing.assert_close(merged, online, rtol=0, atol=1e-13)


def test_merging_copies_and_keeps_the_dtype() -> None:
    weight = torch.randn(KV_HEADS * HEAD_DIM, 3).bfloat16()
    before = weight.clone()
    assert rotation().merge_into(weight, "key").dtype == torch.bfloat16
    assert torch.equal(weight, before)


def test_describes_itself() -> None:
    facts = QueryKeyRotation(KV_HEADS, HEAD_DIM).describe()
    assert facts["symbol"] == "T_k"
    assert facts["parameters"] == 2 * KV_HEADS * HEAD_DIM // 2
    assert facts["smallest_scale"] == facts["largest_scale"] == 1.0


def test_errors_name_the_shapes() -> None:
    with pytest.raises(UserError, match="head_dim = 7 must be even"):
        QueryKeyRotation(2, 7)
    with pytest.raises(UserError, match="does not fit 24 features"):
        rotation().merge_into(torch.zeros(24, 3), "key")
    with pytest.raises(UserError, match="no side 'value'; its sides are key, query"):
        rotation().merge_into(torch.zeros(16, 3), "value")


def test_pairs_that_are_only_scaled() -> None:
    transform = QueryKeyRotation(2, 8, constraint="scale")
    assert [name for name, _ in transform.named_parameters()] == ["log_scale"]
    transform.randomize_(generator(3))
    keys = torch.randn(3, 16, generator=generator(1), dtype=torch.float64)
    with torch.no_grad():
        ratio = transform(keys) / keys
        queries = transform.forward_query(keys) / keys
    scale = transform.log_scale.detach().double().exp()
    torch.testing.assert_close(ratio[0].view(2, 8), torch.cat([scale, scale], dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio * queries, torch.ones_like(ratio), rtol=1e-12, atol=0)
    assert transform.state_dict().keys() == QueryKeyRotation(2, 8).state_dict().keys()
