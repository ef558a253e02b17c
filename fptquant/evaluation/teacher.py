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
from fptquant.files import KeptFile, KeptFiles, read_file, to_bytes
from fptquant.fingerprint import model_digest, tensors_digest, weights_digest

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

    def digest(self) -> str:
        """Tells what one model said from what others said."""
        return weights_digest([("hidden", self.hidden), *self.head.named_parameters()])

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokens: Tensor,
        *,
        text_name: str,
        progress: ProgressCallback | None = None,
        kept: KeptFiles | None = None,
    ) -> TeacherCache:
        """Runs the model on every window once.

        Args:
            kept: where the states of each window are kept when they are known, and found again.

        Shape:
            tokens: [windows, window], int64
        """
        head = output_head(model)
        states = _States(model, kept)
        hidden = []
        for index, window in enumerate(tokens):
            known = states.find(window)
            if known is None:
                if progress is not None:  # what was kept takes no time: a measure of speed begins here
                    progress(index, len(tokens), "full precision")
                known = states.compute(window)
            hidden.append(known)
        if progress is not None:
            progress(len(tokens), len(tokens), "full precision")
        return cls(text_name, tokens, torch.stack(hidden), _copy_head(head), model.config.vocab_size, states.seconds)


class _States:
    """A model's last hidden states of windows, each in a file of its own if they are kept."""

    def __init__(self, model: PreTrainedModel, kept: KeptFiles | None) -> None:
        self.model, self.kept = model, kept
        self.weights = "" if kept is None else model_digest(model)
        self.seconds = 0.0
        """Time that the forward passes took, when they were made."""

    def _file(self, window: Tensor) -> KeptFile | None:
        return None if self.kept is None else self.kept.file(f"{tensors_digest(window)[:32]}.safetensors")

    def find(self, window: Tensor) -> Tensor | None:
        """[window, hidden_size], if they are kept."""
        file = self._file(window)
        if file is None or not file.path.is_file():
            return None
        tensors, rest = read_file(file.path)
        if rest["weights"] != self.weights:
            return None
        self.seconds += rest["seconds"]
        return tensors["hidden"].to(self.model.device)

    def compute(self, window: Tensor) -> Tensor:
        """[window, hidden_size], which are kept when it is time."""
        start = time.perf_counter()
        hidden = last_hidden_states(self.model, window)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        file = self._file(window)
        if file is not None:
            rest = {"weights": self.weights, "seconds": seconds}
            file.write(lambda: to_bytes({"hidden": hidden.cpu().contiguous()}, rest))
        return hidden


def _copy_head(head: nn.Module) -> nn.Module:
    # A deep copy would keep the hooks and gradients of the original alive with it.
    copied = copy.deepcopy(head).requires_grad_(False)
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()
    return copied
