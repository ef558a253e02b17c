"""AWQ: channels of weights that large activations meet get a finer grid, by a scale that merges into what comes before.

At each place of a block (its two norms, the inputs of o_proj and down_proj) the columns of the weights that read it are multiplied
by s = a^alpha / sqrt(max a^alpha min a^alpha), with a the mean |x| of each channel, and the activation is divided by it. alpha is
searched so that rounding the weights to nearest changes what the linears give as little as possible on the calibration text:

    sum over the linears of || (Q(W s) / s - W) X ||^2 = tr(D H D^T),  D = Q(W s) / s - W,  H = X X^T.

One Hessian of a place thus serves all candidates. Ranges are min-max during the search, as in the paper. A scale of the rows that
another place asks for changes nothing here: it is undone where the rows are read.

Source: Lin et al., AWQ, arXiv 2306.00978, equations 4 and 5; the Hessian in place of the inputs and the T_v of shared heads are
this project's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.models.adapter import BlockView
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.models.streaming import PartialDecoder
from fptquant.quantizers.gptq import Hessian
from fptquant.quantizers.grid import Granularity, IntegerGrid
from fptquant.quantizers.range_method import RangeMethod
from fptquant.stages.merge_transforms import check_block_count
from fptquant.stages.progress import Progress, quiet
from fptquant.stages.smooth import READERS, heads_of, scaled_places, set_scale_
from fptquant.transforms import ModelTransforms, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = "scales for salient weights"
_SMALLEST = 1e-4
"""Mean |x| below this counts as this, as for channels that are always 0."""


@dataclass(frozen=True)
class Found:
    """What the search has found at one place of one block."""

    alpha: float
    loss: float
    """tr(D H D^T) with this alpha."""
    nearest: float
    """The same without a scale."""


class Inputs:
    """What is kept of the inputs of a place: their Hessian and the mean |x| of every channel."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._hessian = Hessian(columns, device)
        self._sum = torch.zeros(columns, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., columns]."""
        rows = x.flatten(0, -2)
        self._hessian.add(rows)
        self._sum += rows.abs().sum(0, dtype=torch.float64)
        self._count += len(rows)

    def mean(self) -> Tensor:
        """Mean |x| of every channel, [columns], float64."""
        return self._sum / self._count

    def hessian(self) -> Tensor:
        """The sum of x x^T, [columns, columns], float64; nothing can be added after it."""
        return self._hessian.matrix()


@torch.no_grad()
def search_scale(
    weights: Sequence[Tensor],
    activation: Tensor,
    hessian: Tensor,
    expand: Callable[[Tensor], Tensor],
    *,
    candidates: int,
    grid: IntegerGrid,
    granularity: Granularity,
) -> tuple[Tensor, Found]:
    """The scale of a place, as many numbers as ``activation`` has, and what was found.

    alpha = 0, 1 / candidates, ..., (candidates - 1) / candidates; the first of the best.

    Shape:
        weights: each [rows, columns]; activation: mean |x| of the channels, heads that share one taken together;
        hessian: [columns, columns]; expand: from the shape of ``activation`` to [columns].
    """
    hessian = hessian.to(torch.promote_types(weights[0].dtype, torch.float32))
    best: tuple[Tensor, Found] | None = None
    nearest = 0.0
    for index in range(candidates):
        alpha = index / candidates
        scale = activation.clamp(min=_SMALLEST) ** alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = sum(_loss(weight, expand(scale).to(hessian), hessian, grid, granularity) for weight in weights)
        nearest = loss if index == 0 else nearest
        if best is None or loss < best[1].loss:
            best = scale, Found(alpha, loss, nearest)
    assert best is not None
    return best


def _loss(weight: Tensor, scale: Tensor, hessian: Tensor, grid: IntegerGrid, granularity: Granularity) -> float:
    """tr(D H D^T) for rounding to nearest with min-max ranges."""
    scaled = weight.to(hessian) * scale
    step, zero = ops.set_range(scaled, grid=grid, granularity=granularity, method=RangeMethod("min_max"))
    difference = ops.fake_quant(scaled, step, zero, grid=grid, granularity=granularity).div_(scale).sub_(weight.to(hessian))
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


@torch.no_grad()
def find_scales_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    windows: Tensor,
    *,
    grid: IntegerGrid,
    granularity: Granularity,
    candidates: int = 20,
    prefix: Sequence[int] = (),
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Sets T_n, T_u and T_v, those in use, of a plain full-precision model; merges nothing.

    Blocks are looked at one after the other. Memory: hidden states of all windows, the activations of one block for all windows,
    and the Hessians of its four places.

    Args:
        grid, granularity: of the weights' quantizers.
        candidates: values of alpha that are tried.
        prefix: token ids that stand before every window and take no part.

    Shape:
        windows: [windows, window], int64, the calibration text

    Returns:
        At each place the mean of alpha over the blocks, and the loss in proportion to that without a scale.

    Raises:
        UserError: if the transforms are those of another model, or the inputs of a linear are not finite.
    """
    blocks = view_model(model).blocks
    check_block_count(len(blocks), transforms)
    before = torch.tensor(list(prefix), dtype=torch.int64).expand(len(windows), -1)
    tokens = torch.cat([before, windows], 1).to(model.device)
    decoder = PartialDecoder(model)
    with decoder.only(-1):
        state = decoder.run(tokens, None)
    found: dict[str, list[Found]] = {}
    for block in blocks:
        places = scaled_places(transforms.block(block.index))
        seen = {name: Inputs(block.linear(name).in_features, model.device) for name in READERS if name in places}
        with decoder.only(block.index), _watching(block, seen, before.shape[1]):
            state = decoder.run(tokens, state)
        for name in list(seen):
            place = _set_place_(block, name, places[name], seen.pop(name), candidates, grid, granularity)
            found.setdefault(places[name].name, []).append(place)
        progress(block.index + 1, len(blocks), DESCRIPTION)
    return {name: _summary(places) for name, places in found.items()}


def _watching(block: BlockView, seen: dict[str, Inputs], left_out: int) -> AbstractContextManager[None]:
    def look(inputs: Inputs, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.add(args[0][:, left_out:])

    return hooked(block.linear(name).register_forward_pre_hook(partial(look, inputs)) for name, inputs in seen.items())


def _set_place_(
    block: BlockView, name: str, transform: Transform, inputs: Inputs, candidates: int, grid: IntegerGrid, granularity: Granularity
) -> Found:
    mean, hessian = inputs.mean(), inputs.hessian()
    if not bool(torch.isfinite(hessian).all()):
        raise UserError(f"the inputs of layers.{block.index}.{name} hold NaN or infinity; check the model and its dtype")
    by_head = heads_of(transform, mean)
    weights = [block.linear(reader).weight for reader in READERS[name]]
    scale, found = search_scale(
        weights,
        by_head.mean(1),
        hessian,
        lambda scale: scale[:, None].expand_as(by_head).reshape(-1),
        candidates=candidates,
        grid=grid,
        granularity=granularity,
    )
    set_scale_(transform, scale)
    return found


def _summary(found: Sequence[Found]) -> dict[str, float]:
    nearest = sum(place.nearest for place in found)
    return {
        "alpha": sum(place.alpha for place in found) / len(found),
        "loss": sum(place.loss for place in found) / nearest if nearest else 1.0,
    }
