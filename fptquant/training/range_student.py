"""The student whose weights are rounded already: they keep their integers, the ranges of everything are trained.

A quantized weight is s (q - z) with integers q and z that stay, and a scale s for each channel or group that is learned; so are
scales and zero points of activations and cache, and, where asked, a bias for each output of a linear, which makes up for the mean
of what rounding does there. The teacher computes with the weights as they were before rounding, and without these biases.

Source: the second phase of EfficientQAT, arXiv 2407.11062, which trains quantization parameters end to end; here for a divergence
from the full-precision model, and with the ranges of activations and cache. Biases: bias correction (Nagel et al., arXiv
1906.04721), learned end to end in place of a mean over each layer's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant.config.training import RangeTrainingConfig
from fptquant.models.instrument import quantized_linears
from fptquant.models.rescaling import Rescaling
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.sites import kind_of
from fptquant.training.student import EndToEndStudent, TrainedRange

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedBias(nn.Module):
    """What a linear with a quantized weight adds to its outputs as a parameter: start + unit share.

    ``unit``, the root mean square of the norms of the weight's rows, is the size of outputs for inputs of size 1, so that one
    learning rate suits all linears.

    Shape: share [out], 0 at first.
    """

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        self._quantizer = (quantizer,)  # in a tuple: the module belongs to the model, not to this one
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.unit = wide.square().sum(dim=1).mean().sqrt()
        self.start = wide.new_zeros(len(wide)) if quantizer.bias is None else quantizer.bias.detach()
        self.share = nn.Parameter(torch.zeros_like(self.start))

    def apply_(self) -> None:
        """Gives the quantizer what the parameter stands for, with its graph."""
        (quantizer,) = self._quantizer
        quantizer.bias = self.start + self.unit * self.share

    @torch.no_grad()
    def finish_(self) -> None:
        """Leaves it in the quantizer as plain numbers."""
        self.apply_()
        (quantizer,) = self._quantizer
        assert quantizer.bias is not None
        quantizer.bias = quantizer.bias.detach().clone()


class RangeStudent(EndToEndStudent):
    """Trains the ranges of a calibrated model, whatever has rounded its weights; those that nothing has are rounded to nearest.

    Args:
        unrounded: what `weights_by_name` gave before rounding.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        unrounded: Mapping[str, Tensor],
        settings: RangeTrainingConfig,
        *,
        positions: int | None = None,
    ) -> None:
        super().__init__(model, settings, positions=positions)
        for linear, quantizer in quantized_linears(model):
            linear.weight.copy_(quantizer(linear.weight))
            trained = self.trained_ranges.get(quantizer.name)
            linear.rescaling = Rescaling(unrounded[quantizer.name], None if trained is None else trained.log_scale)
        self.biases = nn.ModuleDict()
        for linear, quantizer in quantized_linears(model) if settings.lr.bias is not None else ():
            bias = self.biases[quantizer.name.replace(".", "_")] = TrainedBias(linear.weight, quantizer)
            self._groups.setdefault("bias", []).append((f"{quantizer.name}.bias", bias.share))

    @property
    def _trained_biases(self) -> list[TrainedBias]:
        return [bias for bias in self.biases.children() if isinstance(bias, TrainedBias)]

    def _trained_range(self, name: str, quantizer: Quantizer) -> TrainedRange:
        return TrainedRange(quantizer, shifts=kind_of(name) != "weight")

    def _prepare(self) -> None:
        super()._prepare()
        for bias in self._trained_biases:
            bias.apply_()

    @torch.no_grad()
    def finish_(self) -> None:
        super().finish_()
        for bias in self._trained_biases:
            bias.finish_()
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
