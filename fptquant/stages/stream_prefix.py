"""The search for a prefix where the model is larger than memory: every look at it reads its blocks one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fptquant.models.architectures import view_model
from fptquant.models.shards import Checkpoint
from fptquant.models.streaming import PartialDecoder, PartState, empty_, fill_
from fptquant.stages.find_prefix import is_massive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StreamedLook:
    """`fptquant.stages.find_prefix.massive_tokens` of a plain model on the meta device, whose weights are read from ``source``.

    In memory at once: one block, and the hidden states of all windows.
    """

    source: Checkpoint
    dtype: torch.dtype
    device: torch.device

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel, windows: Tensor, prefix: Sequence[int] = ()) -> Tensor:
        view, decoder = view_model(model), PartialDecoder(model)
        texts = [torch.cat([torch.tensor(list(prefix), dtype=torch.int64), window]) for window in windows]
        embedding = self.source.tensor(f"{view.adapter.embedding}.weight")  # mapped: the texts touch some of its rows
        states = [embedding[text].to(self.device, self.dtype) for text in texts]
        found = torch.zeros_like(windows, dtype=torch.bool)
        for index, layer in enumerate(view.layers):
            fill_(layer, f"{view.adapter.layers}.{index}.", self.source, self.dtype, self.device)
            with decoder.only(index):
                states = [
                    decoder.run(text[None].to(self.device), PartState(state[None])).hidden[0]
                    for text, state in zip(texts, states, strict=True)
                ]
            empty_(layer)
            found |= torch.stack([is_massive(state[len(prefix) :]) for state in states]).to(found.device)
        return found
