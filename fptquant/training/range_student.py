"""The student whose weights are rounded already: they keep their integers, the ranges of everything are trained.

A quantized weight is s (q - z) with integers q and z that stay, and a scale s for each channel or group that is learned; so are
scales and zero points of activations and cache. The teacher computes with the weights as they were before rounding.

Source: the second phase of EfficientQAT, arXiv 2407.11062, which trains quantization parameters end to end; here for a divergence
from the full-precision model, and with the ranges of activations and cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fptquant.config.training import RangeTrainingConfig
from fptquant.models.instrument import quantized_linears
from fptquant.models.rescaling import Rescaling
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.sites import kind_of
from fptquant.training.student import EndToEndStudent, TrainedRange

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RangeStudent(EndToEndStudent):
    """Trains the ranges of a calibrated model, whatever has rounded its weights; those that nothing has are rounded to nearest.

    Args:
        unrounded: what `weights_by_name` gave before rounding.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, unrounded: Mapping[str, Tensor], settings: RangeTrainingConfig) -> None:
        super().__init__(model, settings)
        for linear, quantizer in quantized_linears(model):
            linear.weight.copy_(quantizer(linear.weight))
            trained = self.trained_ranges.get(quantizer.name)
            linear.rescaling = Rescaling(unrounded[quantizer.name], None if trained is None else trained.log_scale)

    def _trained_range(self, name: str, quantizer: Quantizer) -> TrainedRange:
        return TrainedRange(quantizer, shifts=kind_of(name) != "weight")

    @torch.no_grad()
    def finish_(self) -> None:
        super().finish_()
        for linear, quantizer in quantized_linears(self.model):
            linear.rescaling = None
            trained = self.trained_ranges.get(quantizer.name)
            if trained is not None:
                _change_scale_(linear.weight, trained.start, quantizer)


def weights_by_name(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all weights that have a quantizer [out, in], by the name of that."""
    return {quantizer.name: linear.weight.detach().clone() for linear, quantizer in quantized_linears(model)}


def _change_scale_(weight: Tensor, before: Tensor, quantizer: Quantizer) -> None:
    """Gives a rounded weight the quantizer's scale in place of the one before; its integers stay, exactly."""
    assert quantizer.scale is not None
    old, new = before.double().reshape(-1, 1), quantizer.scale.double().reshape(-1, 1)
    integers = (weight.double().reshape(len(old), -1) / old).round()
    weight.copy_((integers * new).view_as(weight))
