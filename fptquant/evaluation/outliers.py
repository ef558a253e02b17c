"""Outlier features and massive activations, by the definitions of the papers that found them.

Outlier feature (Dettmers et al., "LLM.int8()", arXiv 2208.07339): a channel with magnitudes of at least 6 in at least 25 % of the
layers and at least 6 % of the sequence positions. The second share is one of the positions of all layers together: as the paper
says, "across all hidden states".

Massive activation (Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762): a magnitude above 100 that
is at least 1,000 times the median magnitude of its hidden state: here of one window at one place of one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fptquant.evaluation.places import PLACES
from fptquant.stages.find_prefix import MASSIVE, MASSIVE_RATIO

OUTLIER, OUTLIER_LAYERS, OUTLIER_POSITIONS = 6.0, 0.25, 0.06
"""Magnitude, share of the layers and share of the positions from which on a channel is an outlier feature."""
KEPT = 1000
"""Massive activations of one place that are kept, the largest ones; all are counted."""


@dataclass(frozen=True)
class OutlierFeature:
    """A channel that is an outlier feature of a place."""

    channel: int
    layers: float
    """Share of the layers in which it reaches the magnitude."""
    positions: float
    """Share of the positions of all layers at which it does."""
    largest: float


@dataclass(frozen=True)
class MassiveActivation:
    """One value."""

    window: int
    position: int
    layer: int
    channel: int
    value: float
    ratio: float
    """Its magnitude divided by the median."""


@dataclass(frozen=True)
class PlaceOutliers:
    """What was found at one place."""

    largest: float
    channels: int
    features: list[OutlierFeature]
    """Largest first."""
    massive: list[MassiveActivation]
    """The largest ones, largest first."""
    massive_count: int


@dataclass
class _Counts:
    """What is kept of one place: sizes of layers and channels, whatever the length of the text."""

    reached: dict[int, Tensor] = field(default_factory=dict)
    """By layer: positions at which each channel reaches the magnitude, [channels], int64."""
    largest: dict[int, Tensor] = field(default_factory=dict)
    """By layer: largest magnitude of each channel, [channels], float32."""
    positions: int = 0
    massive: list[MassiveActivation] = field(default_factory=list)
    massive_count: int = 0


class OutlierCounter:
    """Counts outliers at every place, one activation at a time; `note` is what `look_at_windows` calls."""

    def __init__(self) -> None:
        self._places: dict[str, _Counts] = {}

    def note(self, window: int, place: str, layer: int, x: Tensor) -> None:
        """Counts those of one window at one place of one layer.

        Shape: x [1, T, channels]
        """
        values = x.detach().flatten(0, -2).float()
        magnitude = values.abs()
        counts = self._places.setdefault(place, _Counts())
        reached, largest = (magnitude >= OUTLIER).sum(0).cpu(), magnitude.amax(0).cpu()
        counts.reached[layer] = counts.reached[layer] + reached if layer in counts.reached else reached
        counts.largest[layer] = torch.maximum(counts.largest[layer], largest) if layer in counts.largest else largest
        counts.positions += len(values)
        found, number = find_massive(values, window=window, layer=layer)
        counts.massive_count += number
        counts.massive = sorted([*counts.massive, *found], key=lambda each: -abs(each.value))[:KEPT]

    def finish(self) -> dict[str, PlaceOutliers]:
        """What was found, by place, in the order of ``PLACES``."""
        return {place: _finish(self._places[place]) for place in PLACES if place in self._places}


def find_massive(values: Tensor, *, window: int = 0, layer: int = 0) -> tuple[list[MassiveActivation], int]:
    """The massive activations of one hidden state: the largest ``KEPT`` of them, and their number.

    Shape:
        values: [T, channels]
    """
    magnitude = values.abs()
    if not bool((magnitude > MASSIVE).any()):
        return [], 0
    median = float(magnitude.median())
    where = ((magnitude > MASSIVE) & (magnitude >= MASSIVE_RATIO * median)).nonzero()
    found = values[where[:, 0], where[:, 1]]
    order = found.abs().argsort(descending=True, stable=True)[:KEPT]
    places, kept = where[order].tolist(), found[order].tolist()
    return [
        MassiveActivation(window, position, layer, channel, value, abs(value) / median if median > 0 else math.inf)
        for (position, channel), value in zip(places, kept, strict=True)
    ], len(where)


def _finish(counts: _Counts) -> PlaceOutliers:
    largest = torch.stack(list(counts.largest.values())).amax(0)
    features = find_features(torch.stack(list(counts.reached.values())), counts.positions, largest)
    return PlaceOutliers(float(largest.max()), len(largest), features, counts.massive, counts.massive_count)


def find_features(reached: Tensor, positions: int, largest: Tensor) -> list[OutlierFeature]:
    """The outlier features, largest first.

    Args:
        positions: of all layers together.

    Shape:
        reached: [layers, channels], positions at which a channel reaches the magnitude; largest: [channels]
    """
    layers = (reached > 0).double().mean(0)
    share = reached.sum(0).double() / positions
    chosen = ((layers >= OUTLIER_LAYERS) & (share >= OUTLIER_POSITIONS)).nonzero().flatten().tolist()
    found = [OutlierFeature(index, float(layers[index]), float(share[index]), float(largest[index])) for index in chosen]
    return sorted(found, key=lambda feature: -feature.largest)
