"""Which quantizers cost most: each kind of site switched on alone, all others off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fptquant.evaluation.evaluate import Evaluation, evaluate_windows
from fptquant.evaluation.sqnr import in_order
from fptquant.evaluation.teacher import TeacherCache
from fptquant.models.instrument import iter_quantizers, quantizers_off
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.sites import Kind, layer_and_site
from fptquant.stages.progress import Progress, quiet, tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING, EVERYTHING = "nothing", "everything"
KINDS: dict[Kind, str] = {"weight": "all weights", "activation": "all activations", "kv_cache": "KV cache"}
"""What the quantizers of each kind are called together."""


@dataclass(frozen=True)
class Sensitivity:
    """What a model says with some of its quantizers alone."""

    site: str
    """A site, such as ``down_in`` or ``down_proj.weight``; one of ``KINDS``; ``NOTHING`` or ``EVERYTHING``."""
    layer: int | None
    """The one block in which the site was quantized; None for all."""
    evaluation: Evaluation


def quantizer_groups(model: PreTrainedModel, *, per_layer: bool = False) -> dict[tuple[str, int | None], list[Quantizer]]:
    """The quantizers that are switched on together, by site and layer, in the order of the scan.

    Nothing and everything first, then all of a kind where it has several sites, then every site in all layers; with
    ``per_layer`` each site of each layer follows.
    """
    by_site: dict[str, list[Quantizer]] = {}
    for name, quantizer in iter_quantizers(model):
        by_site.setdefault(layer_and_site(name)[1], []).append(quantizer)
    groups: dict[tuple[str, int | None], list[Quantizer]] = {(NOTHING, None): []}
    groups[EVERYTHING, None] = [quantizer for _, quantizer in iter_quantizers(model)]
    for kind, title in KINDS.items():
        of_kind = [quantizer for _, quantizer in iter_quantizers(model, kind)]
        if len({layer_and_site(quantizer.name)[1] for quantizer in of_kind}) > 1:
            groups[title, None] = of_kind
    for site in in_order(by_site):
        groups[site, None] = by_site[site]
    for site in in_order(by_site) if per_layer else ():
        for quantizer in by_site[site]:
            layer = layer_and_site(quantizer.name)[0]
            if layer is not None:
                groups[site, layer] = [quantizer]
    return groups


def scan_sensitivity(
    model: PreTrainedModel, windows: Tensor, *, reference: TeacherCache, per_layer: bool = False, progress: Progress = quiet
) -> list[Sensitivity]:
    """Perplexity of a calibrated model and its divergence from full precision with each kind of site quantized alone.

    Ranges stay as calibrated. What is left with ``NOTHING`` quantized is the cost of a prefix; transforms cost nothing. Of weights
    that lie on their grids nothing can be switched off before `fptquant.evaluation.unrounded` gives the model those that it had.

    Args:
        reference: what the full-precision model said on the same windows.
        per_layer: also each site of each layer alone, one evaluation for every quantizer.

    Shape:
        windows: [windows, window], int64

    Raises:
        UserError: if the reference was computed on other tokens, or a static quantizer has no range yet.
    """
    groups = quantizer_groups(model, per_layer=per_layer)
    scan = []
    for index, ((site, layer), quantizers) in enumerate(groups.items()):
        note = site if layer is None else f"{site}, layer {layer}"
        tell(progress, index, len(groups), "sensitivity", note)
        scan.append(Sensitivity(site, layer, _evaluate_with(model, quantizers, windows, reference)))
    progress(len(groups), len(groups), "sensitivity")
    return scan


def _evaluate_with(model: PreTrainedModel, quantizers: Sequence[Quantizer], windows: Tensor, reference: TeacherCache) -> Evaluation:
    """Evaluates the model with these quantizers on, all others off."""
    with quantizers_off(model):
        for quantizer in quantizers:
            quantizer.mode = "on"
        return evaluate_windows(model, windows, text_name=reference.text_name, reference=reference)
