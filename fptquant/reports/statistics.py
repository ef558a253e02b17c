"""Magnitudes of activations, and the error of every block, collected by hooks on a running model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.evaluation.places import PLACES, run_window, watching
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.models.instrument import quantizers_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class SiteMagnitudes:
    """Magnitudes at one site point."""

    largest: list[float] = field(default_factory=list)
    """``max |x|`` of each layer."""
    median: list[float] = field(default_factory=list)
    """Median of ``|x|`` of each layer."""
    map_layer: int = 0
    """The layer of ``map``."""
    map: Tensor | None = None
    """``|x|``, [tokens, channels]."""


ActivationStatistics = dict[str, SiteMagnitudes]
"""By site point, in the order of ``PLACES``."""


def collect_activations(
    model: PreTrainedModel, tokens: Tensor, *, map_layers: Mapping[str, int] | None = None
) -> ActivationStatistics:
    """Magnitudes at every place and layer for one window, and a map of tokens and channels for one layer of each place.

    Quantizers are off meanwhile, so that only the transforms are seen: a quantizer cuts off what lies outside its range.
    A linear is looked at where its quantizer is, after online transforms. Pass the layers of
    an earlier call (`map_layers_of`) to see the same ones; by default each place shows the layer with its largest value.

    Shape:
        tokens: [T], int64
    """
    chosen = dict(map_layers) if map_layers is not None else {}
    statistics: ActivationStatistics = {name: SiteMagnitudes() for name in PLACES}

    def note(name: str, index: int, x: Tensor) -> None:
        magnitude = x.detach().flatten(0, -2).abs().float()
        site = statistics[name]
        largest = float(magnitude.max())
        if map_layers is None and largest > max(site.largest, default=-1.0):
            chosen[name] = index
        if chosen.get(name) == index:
            site.map_layer, site.map = index, magnitude.cpu()
        site.largest.append(largest)
        site.median.append(float(magnitude.median()))

    with quantizers_off(model), watching(model, note):
        run_window(model, tokens)
    return statistics


def map_layers_of(statistics: ActivationStatistics) -> dict[str, int]:
    """The layer whose map each place shows."""
    return {name: site.map_layer for name, site in statistics.items()}


@dataclass(frozen=True)
class ResidualTrace:
    """The residual after every block, and enough of the embedding to know in which basis it is written."""

    residuals: Tensor
    """[layers, T, hidden_size], float32, every token divided by its root mean square."""
    rows: Tensor
    """Vocabulary entries of ``embeddings``."""
    embeddings: Tensor
    """[rows, hidden_size], float64"""


def trace_residuals(model: PreTrainedModel, tokens: Tensor, *, seed: int = 0) -> ResidualTrace:
    """The residual after every block for one window.

    Tokens are divided by their root mean square, as the next norm will do. That leaves out the scale that S_n carries
    along, and keeps one massive token from hiding the error of all others.

    Shape:
        tokens: [T], int64
    """
    view = view_model(model)
    outputs: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        x = (output[0] if isinstance(output, tuple) else output)[0].detach().double()
        outputs.append((x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)).float().cpu())

    with hooked(layer.register_forward_hook(catch) for layer in view.layers):
        run_window(model, tokens)
    weight = view.embedding.weight.detach()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(weight), generator=generator)[: 4 * view.hidden_size]
    return ResidualTrace(torch.stack(outputs), rows, weight[rows.to(weight.device)].double().cpu())


def block_errors(reference: ResidualTrace, trace: ResidualTrace) -> list[float]:
    """Relative error ``||X - Y|| / ||X||`` of the residual after every block, in the basis of the reference.

    A rotated model writes its residual in another basis: R with E R = E', where E and E' are the two embeddings, is
    solved for by least squares, so any transform of the residual is understood without being told.

    Raises:
        UserError: if the models have different sizes or the traces come from different texts.
    """
    if reference.residuals.shape != trace.residuals.shape or not torch.equal(reference.rows, trace.rows):
        raise UserError(
            f"residuals {list(reference.residuals.shape)} and {list(trace.residuals.shape)} cannot be compared; "
            "trace both models with the same tokens and seed"
        )
    basis = None
    if not torch.equal(reference.embeddings, trace.embeddings):
        # Solved from trace to reference, so that the trace is carried into the basis of the reference.
        basis = torch.linalg.lstsq(trace.embeddings, reference.embeddings).solution.float()
    errors = []
    for expected, found in zip(reference.residuals, trace.residuals, strict=True):
        aligned = found if basis is None else found @ basis
        errors.append(float((expected - aligned).norm() / expected.norm()))
    return errors
