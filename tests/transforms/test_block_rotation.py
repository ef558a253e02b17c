"""Rotations of blocks: the merged weight undoes them, and found ones spread outliers over channels and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.transforms import BlockRotation, DownRotation
from fptquant.transforms.base import generator
from fptquant.transforms.block_rotation import AttentionInputRotation, find_rotation, zigzag


@pytest.mark.parametrize(("channels", "limit", "size"), [(24, 8, 8), (36, 16, 12), (7, 4, 1), (7, 128, 7), (576, 128, 96)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_the_product_is_unchanged(channels: int, limit: int, size: int, dtype: torch.dtype, bound: float) -> None:
    rng, transform = generator(0), DownRotation(channels, limit)
    assert transform.size == transform.describe()["block_size"] == size
    x, weight = torch.randn(5, channels, generator=rng, dtype=dtype), torch.randn(7, channels, generator=rng, dtype=dtype)
    assert torch.equal(transform(x), x)
    transform.randomize_(generator(1))
    difference = transform(x) @ transform.merge_into(weight, "read").T - x @ weight.T
    assert float(difference.abs().max()) < bound * channels**0.5
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=bound, atol=bound)


def outliers(tokens: int = 64, channels: int = 48) -> Tensor:
    """Two loud channels in one block, one loud token."""
    x = torch.randn(tokens, channels, generator=generator(2))
    x[:, 3] *= 40
    x[:, 9] *= 25
    x[5] *= 3
    return x


def test_found_rotations_spread_outliers() -> None:
    x = outliers()
    transform = AttentionInputRotation(48, 12)
    transform.set_(*find_rotation(x, 12, steps=64, rng=generator(0)))
    y = transform(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-4, atol=0)
    assert float(y.abs().max()) < 0.4 * float(x.abs().max())
    loudness = [values.unflatten(-1, (4, 12)).abs().amax((0, 2)) for values in (x, y)]
    assert float(loudness[0].max() / loudness[0].min()) > 10
    assert float(loudness[1].max() / loudness[1].min()) < 3  # blocks are about equally loud
    random = AttentionInputRotation(48, 12)
    random.randomize_(generator(4))
    assert float(y.abs().max()) < float(random(x).abs().max())


def test_one_turn_spreads_the_loudest_channel_evenly() -> None:
    x = torch.zeros(1, 4)
    x[0, 2] = 8.0
    first, _, _ = find_rotation(x, 4, steps=1, rng=generator(0))
    torch.testing.assert_close((x.double() @ first[0].T).abs(), torch.full((1, 4), 4.0).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[0] @ first[0].T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


def test_more_steps_are_never_worse_and_seeds_decide() -> None:
    x = outliers()

    def loudest(steps: int, seed: int = 0) -> float:
        transform = BlockRotation(48, 12)
        transform.set_(*find_rotation(x, 12, steps=steps, rng=generator(seed)))
        return float((x.double().unflatten(-1, (4, 12)).transpose(0, 1) @ transform.first.mT).abs().max())

    assert loudest(64) <= loudest(8) <= loudest(1)
    assert loudest(8) == loudest(8)
    assert loudest(8) != loudest(8, seed=1)


def test_blocks_get_channels_in_a_zigzag() -> None:
    assert zigzag(torch.tensor([1.0, 6.0, 2.0, 5.0, 3.0, 4.0]), 3).tolist() == [1, 4, 2, 3, 5, 0]
    order = zigzag(torch.rand(24, generator=generator(0)), 6)
    assert order.sort().values.tolist() == list(range(24))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"D_d of 24 channels does not fit a weight of \[5, 8\]"):
        DownRotation(24, 8).merge_into(torch.zeros(5, 8), "read")
