"""Folds the gains of the norms into the linears that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.adapter import BlockView
from fptquant.models.architectures import view_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORM_READERS = {"input_norm": ("q_proj", "k_proj", "v_proj"), "post_norm": ("gate_proj", "up_proj")}
"""The linears of a block that read each norm's output."""

ROWS_AT_ONCE = 2048
"""Rows that are multiplied together: bounds the wide copy of an lm_head with many rows."""


def _gain(norm: nn.Module) -> nn.Parameter:
    gain = norm.weight
    assert isinstance(gain, nn.Parameter)
    return gain


def scale_columns_(weight: Tensor, gain: Tensor) -> None:
    """W <- W diag(gain), products in float64, rounded once.

    Shape: weight [rows, columns]; gain [columns].
    """
    for rows in torch.split(weight, ROWS_AT_ONCE):
        rows.copy_(rows.double() * gain.double())


def _fuse_(norm: nn.Module, readers: Iterable[nn.Linear]) -> None:
    gain = _gain(norm)
    for linear in readers:
        scale_columns_(linear.weight, gain)
    gain.fill_(1.0)


@torch.no_grad()
def fuse_block_(block: BlockView) -> None:
    """Folds the gains of one block's two norms, as `fuse_norms_`."""
    for name, readers in NORM_READERS.items():
        _fuse_(block.get(name), [block.linear(reader) for reader in readers])


def fuse_norms_(model: PreTrainedModel) -> None:
    """W <- W diag(gain) for every linear that reads a norm, gain <- 1; products in float64, rounded once.

    Biases stay, since the gain acts on the linear's input. The embedding is not centered: an RMSNorm does not subtract
    the mean, so centering would change the function. Norms of queries and keys (Qwen3) stay: RoPE follows them.

    Raises:
        UserError: if ``lm_head`` is tied to the embedding, which must not get the last norm's gain.
    """
    view = view_model(model)
    if view.tied:
        raise UserError("lm_head and the embedding share one weight, but only lm_head gets the last gain: untie first")
    for block in view.blocks:
        fuse_block_(block)
    with torch.no_grad():
        _fuse_(view.final_norm, [view.lm_head])
