"""DuQuant: rotations and permutations of the inputs of linears, found from the activations of the calibration text.

Of every place some tokens are kept: of each window those with the largest values, and others evenly spaced, `TOKENS` of all windows
together. Memory: that many rows of the inputs of every block.

Source: DuQuant (arXiv 2406.01721).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.adapter import BlockView
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.stages.merge_transforms import check_block_count
from fptquant.stages.progress import Progress, quiet
from fptquant.transforms import BlockTransforms, ModelTransforms, Transform
from fptquant.transforms.base import generator
from fptquant.transforms.block_rotation import BlockRotation, find_rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 256


@torch.no_grad()
def find_rotations_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    windows: Tensor,
    *,
    steps: int = 256,
    seed: int = 0,
    prefix: Sequence[int] = (),
    left_out: int = 0,
    norms_scaled: bool = True,
    progress: Progress = quiet,
) -> None:
    """Sets the rotations of a plain full-precision model; merges nothing.

    Args:
        steps: turns that are tried for each block of channels.
        prefix: token ids that stand before every window and take no part.
        left_out: first tokens of each window that take no part.
        norms_scaled: T_n, if it is in use, is merged already; other transforms are not.

    Shape:
        windows: [windows, window], int64, the calibration text

    Raises:
        UserError: if an activation is not finite.
    """
    view = view_model(model)
    check_block_count(len(view.blocks), transforms)
    found: list[dict[str, list[Tensor]]] = [{} for _ in view.blocks]
    before, rows = torch.tensor(list(prefix), dtype=torch.int64), max(2, TOKENS // max(1, len(windows)))
    with _watching(view.blocks, found, len(prefix) + left_out, rows):
        for index, window in enumerate(windows):
            view.decoder(input_ids=torch.cat([before, window])[None].to(model.device), use_cache=False)
            progress(index + 1, len(windows), "activations for rotations")
    rng = generator(seed)
    for index, places in enumerate(found):
        for name, (before_it, rotation) in _rotations(transforms.block(index), norms_scaled).items():
            x = torch.cat(places[name])
            if not bool(torch.isfinite(x).all()):
                raise UserError(f"the inputs of layers.{index}.{name} hold NaN or infinity; check the model and its dtype")
            x = x if before_it is None else before_it(x)
            rotation.set_(*find_rotation(x, rotation.size, steps=steps, rng=rng))
        progress(index + 1, len(found), "rotations of blocks of channels")


def _rotations(used: BlockTransforms, norms_scaled: bool) -> dict[str, tuple[Transform | None, BlockRotation]]:
    """For the first linear that reads a place: what transforms its input before, and the rotation."""
    scalings = (None, None) if norms_scaled else (used.attn_in_scaling, used.mlp_in_scaling)
    places: dict[str, tuple[Transform | None, BlockRotation | None]] = {
        "q_proj": (scalings[0], used.attn_in_rotation),
        "o_proj": (used.value_mixing, used.out_rotation),
        "gate_proj": (scalings[1], used.mlp_in_rotation),
        "down_proj": (used.up_scaling, used.down_rotation),
    }
    return {name: (before, rotation) for name, (before, rotation) in places.items() if rotation is not None}


def _watching(
    blocks: Sequence[BlockView], found: list[dict[str, list[Tensor]]], left_out: int, rows: int
) -> AbstractContextManager[None]:
    def look(places: dict[str, list[Tensor]], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0][0, left_out:].float()
        loud = x.abs().amax(-1).topk(min(rows // 2, len(x))).indices
        even = torch.linspace(0, len(x) - 1, rows - rows // 2, device=x.device).long()
        chosen = cast(Tensor, torch.unique(torch.cat([loud, even])))
        places.setdefault(name, []).append(x[chosen])

    return hooked(
        block.linear(name).register_forward_pre_hook(partial(look, found[block.index], name))
        for block in blocks
        for name in ("q_proj", "o_proj", "gate_proj", "down_proj")
    )
