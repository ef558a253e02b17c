"""T_n: what a norm and its readers compute is unchanged, merged is online."""

from __future__ import annotations

import pytest
import torch

from fptquant.errors import UserError
from fptquant.transforms import AttentionInputScaling, MLPInputScaling
from fptquant.transforms.base import generator


@pytest.mark.parametrize("kind", [AttentionInputScaling, MLPInputScaling])
def test_readers_get_what_they_got_merged_and_online(kind: type[AttentionInputScaling | MLPInputScaling]) -> None:
    rng, transform = generator(0), kind(6).requires_grad_(False)
    transform.randomize_(rng, spread=1.0)
    x, gain, weight = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((4, 6), (6,), (5, 6)))
    expected = (x * gain) @ weight.T
    merged = (x * transform.merge_into(gain, "norm")) @ transform.merge_into(weight, "read").T
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(transform.inverse(transform(x * gain)) @ weight.T, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(transform.merge_into(gain, "norm"), gain * transform.log_scale.double().exp())
    assert transform(x).sub(x).abs().max() > 0.1


def test_describe_and_errors() -> None:
    transform = MLPInputScaling(3).requires_grad_(False)
    transform.log_scale.copy_(torch.tensor([0.5, 2.0, 1.0]).log())
    facts = transform.describe()
    assert (facts["symbol"], facts["name"]) == ("T_n", "mlp_in_scaling")
    assert (facts["smallest_scale"], facts["largest_scale"]) == pytest.approx((0.5, 2.0))
    with pytest.raises(UserError, match=r"T_n of 3 channels does not fit a weight of shape \[3, 4\] on side read"):
        transform.merge_into(torch.zeros(3, 4), "read")
    with pytest.raises(UserError, match="T_n has no side 'write'"):
        transform.merge_into(torch.zeros(3, 3), "write")
