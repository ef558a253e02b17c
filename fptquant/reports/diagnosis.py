"""Everything that a report shows of a calibrated model and the full-precision one, measured on a few windows of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fptquant.config.schema import Config
from fptquant.config.tables import FULL_PRECISION
from fptquant.data.windows import check_window
from fptquant.evaluation.evaluate import build_reference
from fptquant.evaluation.histograms import ActivationHistograms, Histograms, weight_histograms
from fptquant.evaluation.outliers import OutlierCounter, PlaceOutliers
from fptquant.evaluation.places import look_at_windows
from fptquant.evaluation.samples import continuations, sample_prompts
from fptquant.evaluation.sensitivity import Sensitivity, scan_sensitivity
from fptquant.evaluation.sqnr import quantizer_sqnr
from fptquant.evaluation.teacher import TeacherCache
from fptquant.evaluation.unrounded import unround_, unrounded_weights_
from fptquant.models.architectures import view_model
from fptquant.models.loading import load_model
from fptquant.models.saving import load_calibrated
from fptquant.reports.experiment import DTYPES, PLOT_TOKENS
from fptquant.reports.samples import Samples
from fptquant.reports.statistics import (
    ActivationStatistics,
    ResidualTrace,
    block_errors,
    collect_activations,
    map_layers_of,
    trace_residuals,
)
from fptquant.stages.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Look:
    """What was seen of one model with its quantizers off; the trace alone has them on."""

    activations: ActivationStatistics
    outliers: dict[str, PlaceOutliers]
    histograms: Histograms
    """Of activations by place, of weights by linear."""
    trace: ResidualTrace


@dataclass(frozen=True)
class Diagnosis:
    """A full-precision model before, a calibrated one after."""

    before: Look
    after: Look
    layers: int
    tokens: Tensor
    """What all was measured on, [windows, window], int64."""
    text_name: str
    sqnr: dict[str, float]
    """Decibels, by the name of the quantizer."""
    sensitivity: list[Sensitivity]
    """Empty if it was not asked for."""
    samples: Samples | None = None
    """What both models said after the beginnings of some windows, if they were asked."""
    words: dict[tuple[int, int], str] = field(default_factory=dict)
    """The text of each token, by window and position, that carries a massive activation."""

    @property
    def errors(self) -> list[float]:
        """Relative error of the residual after every block."""
        return block_errors(self.before.trace, self.after.trace)


def diagnose(
    folder: Path,
    config: Config,
    *,
    text: str,
    windows: int,
    window: int,
    samples: int,
    sensitivity: bool,
    per_layer: bool,
    device: torch.device,
    progress: Progress,
) -> Diagnosis:
    """Measures a saved model and the full-precision one that it comes from, one after the other: one is in memory at a time.

    Weights that were rounded for good are measured as all others: beside the model are those that it had before.

    Args:
        folder: that of the calibrated model.
        config: the one it was saved with.
        samples: how many windows give a prompt.

    Raises:
        UserError: if the full-precision model or the text cannot be found, or a window does not fit the context.
    """
    model, tokenizer = load_model(config.model, dtype=DTYPES[config.dtype], device=device)
    check_window(model.config, window + len(config.quantization.prefix or ()), "the window of a report, with the prefix")
    reference, _ = build_reference(model, tokenizer, text=text, windows=windows, window=window, progress=progress)
    before = _look(model, reference.tokens, None, "full precision: activations", progress)
    prompts = sample_prompts(reference.tokens, samples) if samples else reference.tokens[:0]
    said = [(f"{FULL_PRECISION} {config.dtype}", continuations(model, tokenizer, prompts, progress=progress))]
    unrounded = unrounded_weights_(model, folder, config, progress=progress) if config.keeps_rounded else None
    del model
    calibrated, _ = load_calibrated(folder, device=str(device))
    if unrounded is not None:
        unround_(calibrated, unrounded)
    after = _look(calibrated, reference.tokens, map_layers_of(before.activations), "calibrated: activations", progress)
    sqnr = quantizer_sqnr(calibrated, reference.tokens, progress=progress)
    name = f"{config.name} {config.quantization.setting}"
    said.append((name, continuations(calibrated, tokenizer, prompts, progress=progress)))
    return Diagnosis(
        before=before,
        after=after,
        layers=view_model(calibrated).num_layers,
        tokens=reference.tokens,
        text_name=reference.text_name,
        sqnr=sqnr,
        sensitivity=_scan(calibrated, reference, per_layer, progress) if sensitivity else [],
        samples=Samples([str(tokenizer.decode(prompt)) for prompt in prompts], said) if samples else None,
        words={
            (each.window, each.position): str(tokenizer.decode([int(reference.tokens[each.window, each.position])]))
            for look in (before, after)
            for place in look.outliers.values()
            for each in place.massive
        },
    )


def _scan(model: PreTrainedModel, reference: TeacherCache, per_layer: bool, progress: Progress) -> list[Sensitivity]:
    return scan_sensitivity(model, reference.tokens, reference=reference, per_layer=per_layer, progress=progress)


def _look(model: PreTrainedModel, tokens: Tensor, map_layers: Mapping[str, int] | None, what: str, progress: Progress) -> Look:
    outliers, histograms = OutlierCounter(), ActivationHistograms()
    look_at_windows(model, tokens, outliers.note, histograms.note, what=what, progress=progress)
    first = tokens[0, :PLOT_TOKENS]
    return Look(
        collect_activations(model, first, map_layers=map_layers),
        outliers.finish(),
        histograms.histograms | weight_histograms(model),
        trace_residuals(model, first),
    )
