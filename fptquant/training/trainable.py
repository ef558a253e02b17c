"""What end-to-end training asks of the module it trains."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Trainable(Protocol):
    """A student with its teacher inside: it computes its own loss and knows what of it is trained."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """The mean loss of a predicted token, a scalar with gradient.

        Shape:
            tokens: [windows, window], int64
        """

    def divergence(self, tokens: Tensor) -> Tensor:
        """The mean Jensen-Shannon divergence from the teacher, a scalar without gradient, everything quantized as at the end."""

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Names and parameters of each group; a group is a field of ``settings.lr``."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""

    def load_trainable_state_(self, state: dict[str, Tensor]) -> None:
        """Puts back what `trainable_state` gave, bit for bit."""

    def nonfinite_source(self, tokens: Tensor) -> str | None:
        """The first tensor of a forward pass that holds NaN or infinity, by name; none if all are finite."""
