"""AdamW over groups of parameters, the course of their learning rates, and a close eye on their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fptquant.config.training import OptimizationConfig
from fptquant.errors import UserError

Groups = Mapping[str, Sequence[tuple[str, nn.Parameter]]]
"""Names and parameters of each group of learning rates."""


def learning_rate_factor(step: int, steps: int, *, warmup: float, final: float) -> float:
    """Share of the peak learning rate at one step: a linear rise, then half a cosine.

    With w = floor(warmup * steps): (step + 1) / (w + 1) while step < w, and then
    final + (1 - final) (1 + cos(pi t)) / 2 with t from 0 at step w to 1 at the last step.

    Args:
        step: counted from 0.

    >>> [round(learning_rate_factor(step, 6, warmup=0.34, final=0.1), 3) for step in range(6)]
    [0.333, 0.667, 1.0, 0.775, 0.325, 0.1]
    """
    rising = math.floor(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(steps - 1 - rising, 1)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


class GroupedAdamW:
    """torch's AdamW without weight decay, one group of learning rates each.

    The fused form is used: it is one pass over memory, and being elementwise it gives the same bits however work is split.

    Raises:
        UserError: if there is nothing to train, or a group has no learning rate.
    """

    def __init__(self, groups: Groups, settings: OptimizationConfig) -> None:
        self.named = {name: parameter for members in groups.values() for name, parameter in members}
        if not self.named:
            raise UserError(
                f"nothing is trained: no parameter belongs to a group with a learning rate; set one under {settings.key}.lr"
            )
        self.peaks = {group: _peak(settings, group) for group, members in groups.items() if members}
        self._settings = settings
        self._groups = {group: [parameter for _, parameter in groups[group]] for group in self.peaks}
        self._adamw = torch.optim.AdamW(
            [{"params": self._groups[group], "lr": peak} for group, peak in self.peaks.items()],
            betas=(settings.beta1, settings.beta2),
            weight_decay=0.0,
            fused=True,
        )

    def rates(self, step: int) -> dict[str, float]:
        """Learning rate of each group at a step, counted from 0."""
        settings = self._settings
        factor = learning_rate_factor(step, settings.steps, warmup=settings.warmup, final=settings.final_lr)
        return {group: factor * peak for group, peak in self.peaks.items()}

    def gradient_norms(self) -> dict[str, float]:
        """Euclidean norm of the gradients of each group, not finite if one of their values is not."""
        norms = {}
        for group, parameters in self._groups.items():
            found = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
            norms[group] = nn.utils.get_total_norm(found) if found else torch.zeros(())
        device = next(iter(self.named.values())).device
        values = torch.stack([norm.to(device, torch.float64) for norm in norms.values()]).tolist()
        exact = zip(norms, values, strict=True)
        # A float32 norm overflows from about 1e19 on; only then are the squares summed in float64.
        return {group: value if math.isfinite(value) else self._wide_norm(group) for group, value in exact}

    def _wide_norm(self, group: str) -> float:
        squares = (parameter.grad.double().square().sum() for parameter in self._groups[group] if parameter.grad is not None)
        return math.sqrt(sum(float(square) for square in squares))

    def nonfinite_gradient(self) -> str | None:
        """Name of the first parameter whose gradient holds NaN or infinity."""
        for name, parameter in self.named.items():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return name
        return None

    def apply_(self, step: int, norm: float) -> None:
        """Clips the gradients, whose common norm is given, moves the parameters by one step, and forgets the gradients."""
        clip = self._settings.clip_norm
        if clip is not None and norm > clip:
            for gradient in self.gradients().values():
                gradient.mul_(clip / norm)
        for group, rate in zip(self._adamw.param_groups, self.rates(step).values(), strict=True):
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients collected so far, by the name of the parameter."""
        return {name: parameter.grad for name, parameter in self.named.items() if parameter.grad is not None}

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, by the name of the parameter and their own."""
        moments = self._adamw.state
        return {f"{name}/{key}": value for name, p in self.named.items() for key, value in moments.get(p, {}).items()}

    def load_(self, state: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Puts back what `state` and `gradients` gave, bit for bit."""
        entries: dict[int, dict[str, Tensor]] = {}
        index = {name: position for position, name in enumerate(self.named)}
        for key, value in state.items():
            name, _, moment = key.rpartition("/")
            entries.setdefault(index[name], {})[moment] = value.clone()
        restored: dict[str, Any] = {**self._adamw.state_dict(), "state": entries}
        self._adamw.load_state_dict(restored)
        for name, parameter in self.named.items():
            saved = gradients.get(name)
            parameter.grad = None if saved is None else saved.to(parameter.device, copy=True)


def _peak(settings: OptimizationConfig, group: str) -> float:
    peak: float | None = getattr(settings.lr, group)
    if peak is None:
        raise UserError(f"{settings.key}.lr.{group} is null, but its parameters are to be trained; give it a learning rate")
    return peak
