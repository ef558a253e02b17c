"""Transforms and quantizers on the inputs of linears: fused or in turn, the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptquant.models.context import ForwardContext
from fptquant.models.linear_input import transform_and_quantize
from fptquant.quantizers.grid import IntegerGrid, PerTensor
from fptquant.quantizers.quantizer import Quantizer
from fptquant.transforms import DownHadamard, DownKronecker
from fptquant.transforms.base import Transform, generator


def quantizer(**options: bool) -> Quantizer:
    made = Quantizer(IntegerGrid(4, symmetric=False), PerTensor(), **options)
    made.scale, made.zero_point = torch.tensor(0.2), torch.tensor(7.0)
    made.mode = "on"
    return made


def transforms() -> list[Transform]:
    product = DownKronecker(3, 4).requires_grad_(False)
    product.randomize_(generator(1))
    return [DownHadamard(12), product]


X = torch.randn(2, 5, 12, generator=generator(0))


@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=["static", "dynamic"])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_values_are_those_of_transforms_and_quantizer_in_turn(
    options: dict[str, bool], clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, made = transforms(), quantizer(**options)
    made.clip = None if clip is None else torch.tensor(clip)
    in_turn = made(used[1](used[0](X)))
    alone: list[Tensor] = []
    plain = DownKronecker.forward

    def counted(self: DownKronecker, x: Tensor) -> Tensor:
        alone.append(x)
        return plain(self, x)

    monkeypatch.setattr(DownKronecker, "forward", counted)
    y = transform_and_quantize(X, used, made, ForwardContext())
    torch.testing.assert_close(y, in_turn, rtol=0, atol=1e-6)
    assert not alone  # one operator
    seen: list[Tensor] = []
    hook = made.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    assert torch.equal(transform_and_quantize(X, used, made, ForwardContext()), y)
    hook.remove()
    assert len(seen) == 1  # whoever listens to the quantizer hears of every value
    assert len(alone) == 1
    made.mode = "off"
    assert torch.equal(transform_and_quantize(X, used, made, ForwardContext()), used[1](used[0](X)))
    assert torch.equal(transform_and_quantize(X, [], None, ForwardContext()), X)


def test_kept_tokens_are_transformed_and_not_rounded() -> None:
    used, made, context = transforms(), quantizer(), ForwardContext()
    made.full_precision_tokens = 1
    context.begin(torch.arange(5)[None])
    y, expected = transform_and_quantize(X, used, made, context), used[1](used[0](X))
    assert torch.equal(y[:, :1], expected[:, :1])
    assert torch.equal(y[:, 1:], made(expected[:, 1:]))
