"""SmoothQuant: part of what makes activations hard to quantize moves into the weights that read them, channel by channel.

A channel's scale is s = max|X|^alpha / max|W|^(1 - alpha), over the calibration tokens X that reach the linears and the columns of
their weights W; the activation is divided by it, the columns are multiplied. Four places of a block have such scales: the outputs
of its two norms (T_n, as in the paper), the input of o_proj, whose scales merge in v_proj (a diagonal T_v; query heads that share a
value head share their scales), and that of down_proj, whose scales merge in up_proj (T_u).

Source: Xiao et al., SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.adapter import BlockView
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.stages.fuse_norms import NORM_READERS
from fptquant.stages.merge_transforms import check_block_count
from fptquant.stages.progress import Progress, quiet
from fptquant.transforms import BlockTransforms, ModelTransforms, Transform, ValueMixing
from fptquant.transforms.channel_scaling import ChannelScaling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = "largest activations"
READERS = {
    "q_proj": NORM_READERS["input_norm"],
    "o_proj": ("o_proj",),
    "gate_proj": NORM_READERS["post_norm"],
    "down_proj": ("down_proj",),
}
"""For the first linear that reads an activation, all that do."""


@torch.no_grad()
def smooth_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    windows: Tensor,
    *,
    alpha: float = 0.5,
    prefix: Sequence[int] = (),
    left_out: int = 0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Sets T_n, T_u and T_v, those in use, of a plain full-precision model; merges nothing.

    Args:
        alpha: 0 leaves all to the activations, 1 moves all into the weights.
        prefix: token ids that stand before every window and take no part.
        left_out: first tokens of each window that take no part, because they stay in full precision.

    Shape:
        windows: [windows, window], int64, the calibration text

    Returns:
        The largest and the smallest scale at each place, over all blocks.

    Raises:
        UserError: if alpha is not between 0 and 1, or a largest activation is not finite.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha = {alpha}: it is the share of an outlier that moves into the weights; choose 0 to 1")
    blocks = view_model(model).blocks
    check_block_count(len(blocks), transforms)
    largest = _largest_inputs(model, windows, list(prefix), len(prefix) + left_out, progress)
    found: dict[str, list[Tensor]] = {}
    for block, activations in zip(blocks, largest, strict=True):
        for name, scale in _set_scales_(block, transforms.block(block.index), activations, alpha).items():
            found.setdefault(name, []).append(scale.flatten())
    together = {name: torch.cat(scales) for name, scales in found.items()}
    return {name: {"smallest": float(scale.min()), "largest": float(scale.max())} for name, scale in together.items()}


def _largest_inputs(
    model: PreTrainedModel, windows: Tensor, prefix: list[int], left_out: int, progress: Progress
) -> list[dict[str, Tensor]]:
    """max |x| of every channel [columns] at each place of each block."""
    view = view_model(model)
    largest: list[dict[str, Tensor]] = [{} for _ in view.blocks]
    before = torch.tensor(prefix, dtype=torch.int64)
    with _watching(view.blocks, largest, left_out):
        for index, window in enumerate(windows):
            ids = torch.cat([before, window])[None]
            view.decoder(input_ids=ids.to(model.device), use_cache=False)
            progress(index + 1, len(windows), DESCRIPTION)
    for index, places in enumerate(largest):
        for name, values in places.items():
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"the inputs of layers.{index}.{name} hold NaN or infinity; check the model and its dtype")
    return largest


def _watching(blocks: Sequence[BlockView], largest: list[dict[str, Tensor]], left_out: int) -> AbstractContextManager[None]:
    def look(places: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0][:, left_out:].abs().flatten(0, -2).amax(0).float()
        places[name] = torch.maximum(places[name], values) if name in places else values

    return hooked(
        block.linear(name).register_forward_pre_hook(partial(look, largest[block.index], name))
        for block in blocks
        for name in READERS
    )


def _set_scales_(block: BlockView, transforms: BlockTransforms, activations: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Sets the transforms of one block; returns the scales by name of the transform.

    T_v and T_u come first: they scale rows of v_proj and up_proj, and with them the columns that T_n looks at.
    """
    scales: dict[str, Tensor] = {}
    for name, transform in scaled_places(transforms).items():
        activation, weight = (
            heads_of(transform, largest).amax(1) for largest in (activations[name], _largest_columns(block, transforms, name))
        )
        scales[transform.name] = scale = _scales(activation, weight, alpha)
        set_scale_(transform, scale)
    return scales


def scaled_places(transforms: BlockTransforms) -> dict[str, Transform]:
    """The transforms in use that can scale what a place's linears read, by the first of these."""
    places = {
        "o_proj": transforms.value_mixing,
        "down_proj": transforms.up_scaling,
        "q_proj": transforms.attn_in_scaling,
        "gate_proj": transforms.mlp_in_scaling,
    }
    return {name: transform for name, transform in places.items() if transform is not None}


def heads_of(transform: Transform, channels: Tensor) -> Tensor:
    """Values of channels [columns] as [value heads, heads that share one, head_dim]; [1, 1, columns] where there are no heads."""
    if isinstance(transform, ValueMixing):  # heads that share a value head lie next to each other
        return channels.reshape(transform.num_kv_heads, -1, transform.head_dim)
    return channels[None, None]


def set_scale_(transform: Transform, scale: Tensor) -> None:
    """Makes a transform divide the channels by ``scale``, [value heads, head_dim] or [1, columns]."""
    if isinstance(transform, ValueMixing):
        transform.set_matrix_(torch.diag_embed(1 / scale.double()))
    elif isinstance(transform, ChannelScaling):
        transform.log_scale.copy_(-scale[0].log())


def _largest_columns(block: BlockView, transforms: BlockTransforms, name: str) -> Tensor:
    """max |w| of every column [columns], over the linears that read a place, their rows as T_v and T_u leave them."""
    found = []
    for reader in READERS[name]:
        transform, side = {"v_proj": (transforms.value_mixing, "value"), "up_proj": (transforms.up_scaling, "up")}.get(
            reader, (None, "")
        )
        weight = block.linear(reader).weight
        found.append((weight if transform is None else transform.merge_into(weight, side)).abs().amax(0).float())
    return torch.stack(found).amax(0)


def _scales(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Channels that are always 0, or that nothing reads, keep the scale 1.

    >>> _scales(torch.tensor([8.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 0.0]), 0.5)
    tensor([2., 1., 1.])
    """
    usable = (activation > 0) & (weight > 0)
    scale = activation.clamp(min=1e-30) ** alpha / weight.clamp(min=1e-30) ** (1 - alpha)
    return torch.where(usable, scale, 1.0)
