"""The weights of a calibrated model before they were rounded for good, so that what rounding cost can be measured.

GPTQ, AutoRound and range training leave weights on their grids in the saved model. What they were is made again: the transforms
are saved, and merging them into the full-precision model gives the weights that the rounding began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant.models.architectures import view_model
from fptquant.models.instrument import quantized_linears
from fptquant.models.saving import load_transforms
from fptquant.quantizers.quantizer import Quantizer
from fptquant.stages.fuse_norms import fuse_norms_
from fptquant.stages.merge_transforms import merge_transforms_
from fptquant.stages.progress import Progress, quiet
from fptquant.stages.untie import untie_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fptquant.config.schema import Config


class KeptRounding(Quantizer):
    """Stands in for the quantizer of a weight that was rounded for good: ``on`` gives what it was rounded to.

    Shape: x [out_features, in_features], the weight before rounding; returns the same.
    """

    def __init__(self, quantizer: Quantizer, rounded: Tensor) -> None:
        super().__init__(quantizer.grid, quantizer.granularity, name=quantizer.name)
        self.scale, self.zero_point, self.mode = quantizer.scale, quantizer.zero_point, quantizer.mode
        self._rounded = rounded

    def _fake_quant(self, x: Tensor) -> Tensor:
        return self._rounded


@torch.no_grad()
def unrounded_weights_(model: PreTrainedModel, folder: Path, config: Config, *, progress: Progress = quiet) -> dict[str, Tensor]:
    """Merges the saved transforms into a full-precision model, and gives the weights of its linears by the name of their quantizer.

    They differ from those that the rounding began with in the last bits of the model's dtype at most: by the machine, and where a
    trained T_r was merged in two steps.

    Args:
        model: the one that the calibrated model comes from, which is not of use for anything else after that.
        folder: that of the calibrated model.
        config: the one it was saved with.

    Shape: each [out_features, in_features]

    Raises:
        UserError: if the saved transforms are missing, damaged or do not fit the model.
    """
    transforms = load_transforms(model, config, folder).to(model.device)
    if config.norm_gains == "fused":
        untie_(model)
        fuse_norms_(model)
    merge_transforms_(model, transforms, progress=progress)
    return {
        f"layers.{block.index}.{name}.weight": linear.weight.detach()
        for block in view_model(model).blocks
        for name, linear in block.linears()
    }


@torch.no_grad()
def unround_(model: PreTrainedModel, unrounded: Mapping[str, Tensor]) -> None:
    """Gives a calibrated model its weights before rounding; its quantizers, where they are on, give the rounded ones.

    Memory: both for every linear.
    """
    for linear, quantizer in quantized_linears(model):
        rounded = quantizer(linear.weight)
        linear.weight_quantizer = KeptRounding(quantizer, rounded)
        linear.weight = nn.Parameter(unrounded[quantizer.name], requires_grad=False)
