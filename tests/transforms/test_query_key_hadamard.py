"""T_h: products of queries and keys stay as they are."""

from __future__ import annotations

import pytest
import torch

from fptquant.errors import UserError
from fptquant.transforms import QueryKeyHadamard
from tests.ops.common import random


@pytest.mark.parametrize("head_dim", [12, 64, 80])
def test_scores_stay(head_dim: int) -> None:
    transform = QueryKeyHadamard(head_dim)
    query, key = random(2, 6, 5, head_dim), random(2, 6, 7, head_dim, seed=1)
    scores = transform(query) @ transform(key).mT
    torch.testing.assert_close(scores, query @ key.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.inverse(transform(key)), key, rtol=0, atol=1e-12)
    assert not torch.allclose(transform(key), key)


def test_errors() -> None:
    with pytest.raises(UserError, match="18"):
        QueryKeyHadamard(18)
    with pytest.raises(UserError, match="T_h comes after RoPE"):
        QueryKeyHadamard(12).merge_into(torch.zeros(12, 12), "key")
