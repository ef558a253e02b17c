"""What the full-precision model said, kept as hidden states instead of logits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant.evaluation.hidden import last_hidden_states, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ProgressCallback = Callable[[int, int, str], None]
"""Called with what is done, how much there is, and what is being done."""


@dataclass(frozen=True)
class TeacherCache:
    """Last hidden states of the full-precision model and a copy of its head.

    The head is copied, because calibration folds the last norm and rotations into the model's own.
    """

    text_name: str
    tokens: Tensor
    """[windows, window], int64"""
    hidden: Tensor
    """[windows, window, hidden_size]"""
    head: nn.Module
    vocabulary: int
    seconds: float
    """Time that the forward passes took."""

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokens: Tensor, *, text_name: str, progress: ProgressCallback | None = None
    ) -> TeacherCache:
        """Runs the model on every window once.

        Shape:
            tokens: [windows, window], int64
        """
        head = output_head(model)
        start = time.perf_counter()
        hidden = []
        for index, window in enumerate(tokens):
            if progress is not None:
                progress(index, len(tokens), "full precision")
            hidden.append(last_hidden_states(model, window))
        if progress is not None:
            progress(len(tokens), len(tokens), "full precision")
        seconds = time.perf_counter() - start
        return cls(text_name, tokens, torch.stack(hidden), _copy_head(head), model.config.vocab_size, seconds)


def _copy_head(head: nn.Module) -> nn.Module:
    # A deep copy would keep the hooks and gradients of the original alive with it.
    copied = copy.deepcopy(head).requires_grad_(False)
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    return copied
