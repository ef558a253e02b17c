"""Merges transforms into the weights of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from fptquant.errors import UserError
from fptquant.models.adapter import BlockView, ModelView
from fptquant.models.architectures import view_model
from fptquant.stages.fuse_norms import NORM_READERS
from fptquant.stages.progress import Progress, quiet
from fptquant.transforms import ModelTransforms, ResidualRotation, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIDES: dict[str, dict[str, str]] = {
    "attn_in_scaling": {"input_norm": "norm", **dict.fromkeys(NORM_READERS["input_norm"], "read")},
    "mlp_in_scaling": {"post_norm": "norm", **dict.fromkeys(NORM_READERS["post_norm"], "read")},
    "query_key_rotation": {"k_proj": "key", "q_proj": "query"},
    "value_mixing": {"v_proj": "value", "o_proj": "output"},
    "up_scaling": {"up_proj": "up", "down_proj": "down"},
    "down_hadamard": {"down_proj": "down"},
    "out_hadamard": {"o_proj": "out"},
    "attn_in_kronecker": dict.fromkeys(NORM_READERS["input_norm"], "read"),
    "mlp_in_kronecker": dict.fromkeys(NORM_READERS["post_norm"], "read"),
    "out_kronecker": {"o_proj": "read"},
    "down_kronecker": {"down_proj": "read"},
    "query_key_mixing": {},
    "attn_in_rotation": dict.fromkeys(NORM_READERS["input_norm"], "read"),
    "mlp_in_rotation": dict.fromkeys(NORM_READERS["post_norm"], "read"),
    "out_rotation": {"o_proj": "read"},
    "down_rotation": {"down_proj": "read"},
    "residual_rotation": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "read"),
        **dict.fromkeys(("o_proj", "down_proj"), "write"),
    },
}
"""For each transform, the linears and norms it is merged into and the side on which they stand."""

OUTPUT_SIDES = frozenset({"key", "query", "value", "up", "write"})
"""Sides on which the transform acts on the output of a linear, hence on its bias too."""


def _merge_into_(module: nn.Module, transform: Transform, side: str) -> None:
    """A linear, or a norm with its gain for a weight."""
    for parameter in (module.weight, getattr(module, "bias", None) if side in OUTPUT_SIDES else None):
        if isinstance(parameter, nn.Parameter):
            parameter.copy_(transform.merge_into(parameter, side))


@torch.no_grad()
def merge_block_(block: BlockView, transforms: Iterable[Transform]) -> None:
    """Merges transforms into the linears and norms of one block, in the order given.

    Raises:
        UserError: for T_k where norms of queries and keys sit between the projections and RoPE.
    """
    for transform in transforms:
        if transform.name == "query_key_rotation" and block.adapter.has_qk_norm:
            raise UserError(
                f"T_k cannot be merged into {block.adapter.architecture}: norms of queries and keys sit between the "
                "projections and RoPE; leave query_key_rotation out"
            )
        for name, side in BLOCK_SIDES[transform.name].items():
            _merge_into_(block.get(name), transform, side)


@torch.no_grad()
def rotate_residual_(model: PreTrainedModel, rotation: ResidualRotation, progress: Progress = quiet) -> None:
    """Merges T_r into the embedding, every block and ``lm_head``.

    Raises:
        UserError: if ``lm_head`` is tied to the embedding or a norm still has a gain; nothing has been changed then.
    """
    view = view_model(model)
    _check_rotation(view)
    rotation = rotation.frozen()
    embedding = view.embedding.weight
    embedding.copy_(rotation.merge_into(embedding, "embedding"))
    blocks = view.blocks
    for index, block in enumerate(blocks):
        merge_block_(block, [rotation])
        progress(index + 1, len(blocks), "merging the residual rotation")
    _merge_into_(view.lm_head, rotation, "read")


def check_block_count(blocks: int, transforms: ModelTransforms) -> None:
    """Raises a UserError unless the transforms were built for a model of so many blocks."""
    if blocks != len(transforms.blocks):
        raise UserError(f"the model has {blocks} blocks, the transforms were built for {len(transforms.blocks)}")


def scale_norms_(model: PreTrainedModel, transforms: ModelTransforms) -> None:
    """Merges T_n of every block, if it is in use.

    Raises:
        UserError: if the numbers of blocks differ.
    """
    blocks = view_model(model).blocks
    check_block_count(len(blocks), transforms)
    for index, block in enumerate(blocks):
        merge_block_(block, transforms.block(index).norm_scalings())


def merge_blocks_(model: PreTrainedModel, transforms: ModelTransforms, *, progress: Progress = quiet) -> None:
    """Merges the transforms of every block: everything but T_r and T_n.

    Raises:
        UserError: as `merge_block_`, or if the numbers of blocks differ.
    """
    blocks = view_model(model).blocks
    check_block_count(len(blocks), transforms)
    for index, block in enumerate(blocks):
        merge_block_(block, transforms.block(index).of_linears())
        progress(index + 1, len(blocks), "merging the transforms")


def merge_transforms_(model: PreTrainedModel, transforms: ModelTransforms, *, progress: Progress = quiet) -> None:
    """Merges everything that can be merged, T_r first, then T_n; what acts at run time (T_d's transform, S_n) is left to the model.

    Local optimization comes in between, because it looks at the rotated weights: `rotate_residual_` and `scale_norms_`, then
    `fptquant.stages.optimize_local.optimize_local_`, then `merge_blocks_`.

    Raises:
        UserError: as `rotate_residual_` and `merge_blocks_`.
    """
    if transforms.residual_rotation is not None:
        rotate_residual_(model, transforms.residual_rotation, progress)
    scale_norms_(model, transforms)
    merge_blocks_(model, transforms, progress=progress)


def _check_rotation(view: ModelView) -> None:
    if view.tied:
        raise UserError("T_r acts differently on the embedding and lm_head, which share one weight: untie first")
    norms = {f"layer {block.index} {name}": block.get(name) for block in view.blocks for name in ("input_norm", "post_norm")}
    norms["final norm"] = view.final_norm
    for name, norm in norms.items():
        gain = norm.weight
        assert isinstance(gain, nn.Parameter)
        if not bool((gain == 1).all()):
            raise UserError(f"T_r does not commute with a norm's gain, and the gain of {name} is not 1: fuse norms first")
