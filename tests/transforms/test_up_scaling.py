"""T_u: the gated product is unchanged, merged is online."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fptquant.errors import UserError
from fptquant.transforms import UpScaling
from fptquant.transforms.base import generator


def test_the_gated_mlp_is_unchanged_merged_and_online() -> None:
    rng, transform = generator(0), UpScaling(10).requires_grad_(False)
    transform.randomize_(rng, spread=1.0)
    x, gate, up = (torch.randn(rows, 6, generator=rng, dtype=torch.float64) for rows in (4, 10, 10))
    down, bias = torch.randn(6, 10, generator=rng, dtype=torch.float64), torch.randn(10, generator=rng, dtype=torch.float64)
    gated = functional.silu(x @ gate.T)
    expected = (gated * (x @ up.T + bias)) @ down.T
    online = transform.inverse(gated * transform(x @ up.T + bias)) @ down.T
    merged_up, merged_bias = transform.merge_into(up, "up"), transform.merge_into(bias, "up")
    merged = (gated * (x @ merged_up.T + merged_bias)) @ transform.merge_into(down, "down").T
    torch.testing.assert_close(online, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(merged_up, up * transform.log_scale.double().exp()[:, None])


def test_describe_and_errors() -> None:
    transform = UpScaling(3).requires_grad_(False)
    transform.log_scale.copy_(torch.tensor([0.5, 2.0, 1.0]).log())
    facts = transform.describe()
    assert (facts["smallest_scale"], facts["largest_scale"]) == pytest.approx((0.5, 2.0))
    with pytest.raises(UserError, match=r"T_u of 3 channels does not fit a weight of shape \[4, 3\] on side up"):
        transform.merge_into(torch.zeros(4, 3), "up")
