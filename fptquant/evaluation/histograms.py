"""Histograms of magnitudes over fixed bins: one pass, and the same bins for every text, place and model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fptquant.models.architectures import view_model
from fptquant.models.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOWEST, HIGHEST, PER_OCTAVE = -24, 24, 4
EDGES = torch.cat(
    [
        torch.zeros(1),
        torch.exp2(torch.arange(LOWEST * PER_OCTAVE, HIGHEST * PER_OCTAVE + 1, dtype=torch.float64) / PER_OCTAVE).float(),
        torch.tensor([torch.inf]),
    ]
)
"""Edges of the bins: 0, 2^-24 to 2^24 in quarters of an octave, infinity. A bin holds its lower edge."""

_CHUNK = 2**22
"""Values that are sorted into bins at once."""

Histograms = dict[str, Tensor]
"""By place or linear: how many values fell into each bin, int64 [bins]."""


def count_magnitudes(x: Tensor) -> Tensor:
    """How many of ``|x|`` fall between any two neighbors of ``EDGES``.

    Shape: x any; returns [bins], int64

    >>> counts = count_magnitudes(torch.tensor([0.0, -1.0, 1.1, 3.0]))
    >>> [(float(EDGES[index]), int(counts[index])) for index in counts.nonzero().flatten()]
    [(0.0, 1), (1.0, 2), (2.8284270763397217, 1)]
    """
    counts = torch.zeros(len(EDGES) - 1, dtype=torch.int64)
    edges = EDGES[1:-1].to(x.device)
    for part in torch.split(x.detach().reshape(-1), _CHUNK):
        bins = torch.bucketize(part.abs().float(), edges, out_int32=True, right=True)
        counts += torch.bincount(bins, minlength=len(counts)).cpu()
    return counts


class ActivationHistograms:
    """Histograms of every place over all layers, one activation at a time; `note` is what `look_at_windows` calls."""

    def __init__(self) -> None:
        self.histograms: Histograms = {}

    def note(self, window: int, place: str, layer: int, x: Tensor) -> None:
        """Counts one activation."""
        counts = count_magnitudes(x)
        self.histograms[place] = self.histograms[place] + counts if place in self.histograms else counts


@torch.inference_mode()
def weight_histograms(model: PreTrainedModel) -> Histograms:
    """The weights of every kind of linear over all layers, with transforms merged and before quantization."""
    found: Histograms = {}
    for block in view_model(model).blocks:
        for name, linear in block.linears():
            weight = linear.merged_weight() if isinstance(linear, QuantizedLinear) else linear.weight
            counts = count_magnitudes(weight)
            found[name] = found[name] + counts if name in found else counts
    return found
