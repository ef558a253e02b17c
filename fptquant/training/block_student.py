"""The student that is one block: quantized, after quantized blocks, it learns to give what it gives in the full-precision model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant.config.training import BlockTrainingConfig
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import view_model
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.streaming import PartialDecoder, PartState
from fptquant.training.student import Student
from fptquant.transforms import ModelTransforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockData:
    """What a block reads, and what it is to give.

    Shape: tokens [windows, T], int64; inputs and targets: hidden states of all windows before and after the block.
    """

    decoder: PartialDecoder
    """In which the block alone is in place."""
    tokens: Tensor
    first: Sequence[int]
    """The position at which each window begins."""
    inputs: PartState
    targets: PartState


class BlockStudent(Student):
    """Trains the transforms of one block, which are attached, and the ranges of its quantizers, the only ones that are in place;
    with ``lr.weight`` the weights of its linears as well, through rounding as if it were not there.

    It is called with the numbers of windows in place of their tokens. `finish_` leaves the transforms attached.

    Shape: numbers [B, 1], int64
    """

    settings: BlockTrainingConfig

    def __init__(
        self, model: PreTrainedModel, transforms: ModelTransforms, settings: BlockTrainingConfig, block: int, data: BlockData
    ) -> None:
        super().__init__(model, settings, transforms, [block])
        self._block, self._data = block, data
        self.weights = nn.ParameterDict()
        if settings.lr.weight is not None:
            self._collect_weights()

    def _collect_weights(self) -> None:
        block = view_model(self.model).blocks[self._block]
        for name in LINEAR_NAMES:
            linear = block.linear(name)
            assert isinstance(linear, QuantizedLinear)
            weight = linear.weight
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(True)
            self.weights[name] = weight
            self._groups.setdefault("weight", []).append((f"layers_{self._block}.{name}.weight", weight))

    def forward(self, numbers: Tensor) -> Tensor:
        """The mean error of a token, with gradients for everything trained."""
        self._prepare()
        return self._errors(numbers[:, 0]).mean()

    @torch.no_grad()
    def divergence(self, numbers: Tensor) -> Tensor:
        """The mean error of a token."""
        return self.forward(numbers)

    def _errors(self, rows: Tensor) -> Tensor:
        """Of each token, [B, T], in float32 or wider."""
        data = self._data
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=self.settings.autocast == "bfloat16"):
            first = [data.first[row] for row in rows.tolist()]
            output = data.decoder.run(data.tokens[rows], data.inputs.rows(rows), first=first)
        return output.errors(data.targets.rows(rows), self.settings.objective)

    @torch.no_grad()
    def nonfinite_source(self, numbers: Tensor) -> str | None:
        """The first range that is not finite, or else the block's input or output."""
        self._prepare()
        rows = numbers[:, 0]
        if not bool(self._data.inputs.rows(rows).residual().isfinite().all()):
            return f"the input of layers.{self._block}"
        bad_output = not bool(self._errors(rows).isfinite().all())
        return self._nonfinite_range() or (f"the output of layers.{self._block}" if bad_output else None)

    @torch.no_grad()
    def finish_(self) -> None:
        super().finish_()
        for part in (*self.trained.children(), self.weights):
            part.requires_grad_(False)
