"""How well every quantizer of a calibrated model keeps what it is given: signal-to-quantization-noise ratios by layer and site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fptquant.evaluation.metrics import decibels, sqnr_db
from fptquant.evaluation.places import run_window
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.hooks import hooked
from fptquant.models.instrument import iter_quantizers, kept_modes, quantized_linears, set_modes
from fptquant.quantizers.quantizer import Quantizer, drop_kept
from fptquant.quantizers.sites import BLOCK_POINTS, layer_and_site
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SITES = (*BLOCK_POINTS, *(f"{name}.weight" for name in LINEAR_NAMES))
"""Every site of a block: points in the order of the data flow, then weights."""


class _Sums:
    """Sums of squares of what a quantizer was given and of what it changed."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of a quantizer. Kept tokens take no part: they are not quantized."""
        assert isinstance(module, Quantizer)
        x, kept = args[0], args[1] if len(args) > 1 else None
        difference = x.double() - output.double()
        if kept is not None:
            x, difference = drop_kept(x, kept), drop_kept(difference, kept)
        self.signal += float(x.double().square().sum())
        self.noise += float(difference.square().sum())


@torch.inference_mode()
def quantizer_sqnr(model: PreTrainedModel, windows: Tensor, *, progress: Progress = quiet) -> dict[str, float]:
    """``10 log10(sum x^2 / sum (x - Q(x))^2)`` in decibels of every quantizer of a calibrated model, by its name.

    All quantizers are on, so each meets what the others have left of a value, as it does in use; the ratio is the error
    of that one quantizer. Activations and caches are measured on the windows, all of them as one signal, weights as they
    are. Infinite where nothing is changed, as for weights that lie on their grids already: `fptquant.evaluation.unrounded` gives a
    model those that it had before.

    Shape:
        windows: [windows, window], int64

    Raises:
        UserError: if a static quantizer has no range yet.
    """
    sums = {name: _Sums() for kind in ("activation", "kv_cache") for name, _ in iter_quantizers(model, kind)}
    handles = (quantizer.register_forward_hook(sums[name]) for name, quantizer in iter_quantizers(model) if name in sums)
    with kept_modes(model), hooked(handles):
        set_modes(model, "on")
        for index, tokens in enumerate(windows if sums else windows[:0]):
            progress(index, len(windows), "SQNR of every site")
            run_window(model, tokens)
        found = {name: decibels(both.signal, both.noise) for name, both in sums.items()}
        for linear, quantizer in quantized_linears(model):
            weight = linear.merged_weight()
            found[quantizer.name] = sqnr_db(weight, quantizer(weight))
    progress(len(windows), len(windows), "SQNR of every site")
    return found


def by_site(values: Mapping[str, float], layers: int) -> dict[str, list[float]]:
    """Values of quantizers as a list over the layers for each site, in the order of ``SITES``; NaN where a layer has none.

    Quantizers outside of the blocks are left out.

    >>> by_site({"layers.1.v_cache": 2.0, "layers.0.k_cache": 1.0, "layers.1.k_cache": 3.0, "final_norm_out": 9.0}, 2)
    {'k_cache': [1.0, 3.0], 'v_cache': [nan, 2.0]}
    """
    found: dict[str, list[float]] = {}
    for name, value in values.items():
        layer, site = layer_and_site(name)
        if layer is not None:
            found.setdefault(site, [math.nan] * layers)[layer] = value
    return {site: found[site] for site in in_order(found)}


def in_order(sites: Iterable[str]) -> list[str]:
    """Sites in the order of ``SITES``, those outside of the blocks last."""
    place = {site: index for index, site in enumerate(SITES)}
    return sorted(sites, key=lambda site: place.get(site, len(place)))
