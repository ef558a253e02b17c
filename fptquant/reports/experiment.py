"""A run from beginning to end: check, load, measure in full precision, calibrate, measure again, write it all down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.config.labels import AUTO_PREFIX
from fptquant.config.schema import Config
from fptquant.diagnostics import diagnostics
from fptquant.evaluation.evaluate import build_reference, evaluate_windows, evaluation_windows
from fptquant.evaluation.teacher import ProgressCallback, TeacherCache
from fptquant.files import KeptFiles
from fptquant.models.adapter import view_model
from fptquant.models.loading import load_model
from fptquant.reports.plots import plot_activations, plot_block_errors, plot_outliers
from fptquant.reports.processes import resolve_device
from fptquant.reports.progress import Labeled
from fptquant.reports.run_folder import write_json
from fptquant.reports.statistics import (
    ActivationStatistics,
    ResidualTrace,
    block_errors,
    collect_activations,
    map_layers_of,
    trace_residuals,
)
from fptquant.reports.table import Row, markdown_table
from fptquant.reports.unfinished_run import EVALUATION, check_run, config_files, lasting_run_folder, note_checkpoint
from fptquant.stages.calibrate import CalibrationResult, calibrate, calibration_windows, check_model
from fptquant.stages.distributed import is_main, main_first, main_holds, on_main, world_size
from fptquant.stages.find_prefix import check_prefix, with_prefix
from fptquant.stages.rounding import check_rounding
from fptquant.stages.train import check_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REPORT_BYTES = 5_000_000
"""Room for plots, tables and configs."""
PLOT_TOKENS = 256
"""Tokens of the first evaluation window that the plots look at."""
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Outcome:
    """What came of one method in one setting."""

    config: Config
    row: Row
    calibration: dict[str, Any]
    """Metrics of the calibration: seconds of each stage, and what the stages report."""
    errors: list[float]
    """Relative error of the residual after every block."""

    @property
    def key(self) -> str:
        return f"{self.config.name} {self.config.quantization.label}"


@dataclass(frozen=True)
class Baseline:
    """The full-precision model, and what it does on the evaluation text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cache: TeacherCache
    shared: bool
    """Whether the cache holds this process's share of the evaluation windows, and not all of them."""
    kept: KeptFiles | None
    """Where the scores of evaluation windows are kept; nowhere if there are several processes."""
    row: Row
    trace: ResidualTrace
    activations: ActivationStatistics
    prefixes: dict[str, list[int] | None] = field(default_factory=dict)
    """What ``prefix: auto`` has found, by everything that decides it besides the model."""


@dataclass(frozen=True)
class Experiment:
    """Rows of the table, full precision first, and where everything was written."""

    rows: list[Row]
    folder: Path


def run_experiment(
    configs: Sequence[Config],
    *,
    title: str,
    output: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    save: bool = False,
    progress: ProgressCallback,
) -> Experiment:
    """Runs several configs on one model and writes one run folder.

    The configs share model, dtype, device and evaluation, which are those of the first. With ``save`` each calibrated
    model is written into the run folder. Runs that train can be killed, and go on with ``resume``.

    Raises:
        UserError: for everything that can be known to fail, before any long work begins.
    """
    first = configs[0]

    def check(needed_bytes: int) -> None:
        check_run(output, config_files(configs), overwrite=overwrite, resume=resume, needed_bytes=needed_bytes)

    on_main(lambda: check(_REPORT_BYTES))
    device = resolve_device(first.device)
    with main_first():  # models and texts are fetched once
        model, tokenizer = load_model(first.model, dtype=DTYPES[first.dtype], device=device)
        for config in configs:
            preflight(model, tokenizer, config)
        settings = first.evaluation
        windows, _ = evaluation_windows(model, tokenizer, settings.text, settings.windows, settings.window)
    on_main(lambda: check(_needed_bytes(model, windows, len(configs) if save else 0, sum(config.rounds for config in configs))))
    with _results_folder(configs, output, overwrite=overwrite, resume=resume) as folder:
        if is_main():
            (folder / "plots").mkdir()
        kept = KeptFiles(folder / EVALUATION) if world_size() == 1 else None
        shared = 1 < world_size() <= len(windows)
        baseline = _measure_baseline(model, tokenizer, first, shared, kept, progress)
        outcomes = []
        for index, config in enumerate(configs):
            # Magnitudes before rounding hardly depend on the setting: one picture for each method says it.
            plot = bool(config.transforms.used) and config.name not in {earlier.name for earlier in configs[:index]}
            several, last = len(configs) > 1, index == len(configs) - 1
            outcomes.append(
                _run_config(baseline, config, folder, progress, resume=resume, save=save, several=several, last=last, plot=plot)
            )
        rows = [baseline.row, *(outcome.row for outcome in outcomes)]
        if is_main():
            _write(folder, configs, baseline, outcomes, title)
    return Experiment(rows, Path(output))


@contextmanager
def _results_folder(configs: Sequence[Config], output: str | Path, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """The folder that the run is written into, by the main process; the errors of all say how the run goes on."""

    def folder() -> AbstractContextManager[Path]:
        return lasting_run_folder(output, config_files(configs), overwrite=overwrite, resume=resume)

    with main_holds(folder) as path:
        try:
            yield path
        except BaseException as error:
            if not is_main():
                note_checkpoint(error, path)
            raise


def preflight(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Everything that a config asks of a model and of the calibration text, in seconds.

    Raises:
        UserError: if a transform does not fit the model, a Hadamard size is impossible, a window is longer than the
            model's context, a group does not divide a layer, a text is too short, or training lacks a package.
    """
    check_model(model, config)
    check_training(model, config)
    check_rounding(model, config)
    check_prefix(model, tokenizer, config, calibration_windows(model, tokenizer, config).shape[1], config.evaluation.window)


def _needed_bytes(model: PreTrainedModel, windows: Tensor, saved: int, rounded: int) -> int:
    """Disk space for so many saved models, and so many whose rounded blocks are kept until the run is finished."""
    states = windows.numel() * int(model.config.hidden_size) * model.dtype.itemsize
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # Untying adds a head as large as the embedding, at most as much again; the smaller files are within the rest.
    embedding = view_model(model).embedding.weight
    return (
        _REPORT_BYTES
        + states
        + rounded * parameters
        + saved * int(1.05 * (parameters + embedding.numel() * embedding.element_size()))
    )


def _measure_baseline(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    shared: bool,
    kept: KeptFiles | None,
    progress: ProgressCallback,
) -> Baseline:
    settings = config.evaluation
    cache, evaluation = build_reference(
        model,
        tokenizer,
        text=settings.text,
        windows=settings.windows,
        window=settings.window,
        progress=progress,
        shared=shared,
        kept=kept,
    )
    tokens = cache.tokens[0, :PLOT_TOKENS]
    row = Row("full precision", config.dtype, evaluation, evaluation.seconds)
    return Baseline(model, tokenizer, cache, shared, kept, row, trace_residuals(model, tokens), collect_activations(model, tokens))


def _run_config(
    baseline: Baseline,
    config: Config,
    folder: Path,
    progress: ProgressCallback,
    *,
    resume: bool,
    save: bool,
    several: bool,
    last: bool,
    plot: bool,
) -> Outcome:
    labeled = Labeled(progress, f"{config.name} {config.quantization.label}: " if several else "")
    name = f"{config.name}-{config.quantization.label}"
    work = folder / "training" / name if several else folder
    if is_main():
        work.mkdir(parents=True, exist_ok=True)
    searched = None
    if config.quantization.prefix == AUTO_PREFIX and config.quantization.quantized_sites:
        searched = f"{config.calibration} {config.seed}"
    known = with_prefix(config, baseline.prefixes[searched]) if searched in baseline.prefixes else config
    # The last one needs no copy: nobody asks the full-precision model any more.
    result: CalibrationResult = calibrate(
        baseline.model, baseline.tokenizer, known, in_place=last, folder=work, resume=resume, progress=labeled
    )
    if searched is not None:
        baseline.prefixes[searched] = result.config.quantization.prefix  # type: ignore[assignment]
    cache = baseline.cache
    evaluation = evaluate_windows(
        result.model,
        cache.tokens,
        text_name=cache.text_name,
        reference=cache,
        progress=labeled,
        shared=baseline.shared,
        kept=None if baseline.kept is None else baseline.kept.file(f"{name}.json"),
    )
    row = Row(config.name, result.config.quantization.setting, evaluation, result.metrics["seconds"] + evaluation.seconds)
    tokens = cache.tokens[0, :PLOT_TOKENS]
    errors = block_errors(baseline.trace, trace_residuals(result.model, tokens))
    if plot and is_main():
        _plot_magnitudes(baseline, result, folder / "plots", f"-{config.name}" if several else "")
    if save and is_main():
        result.save(folder / "models" / name if several else folder / "model")
    return Outcome(config, row, dict(result.metrics), errors)


def _plot_magnitudes(baseline: Baseline, result: CalibrationResult, plots: Path, suffix: str) -> None:
    config = result.config
    tokens = baseline.cache.tokens[0, :PLOT_TOKENS]
    after = collect_activations(result.model, tokens, map_layers=map_layers_of(baseline.activations))
    what = f"{config.model}, {config.name}, {config.quantization.label}"
    plot_activations(baseline.activations, after, plots / f"activations{suffix}.png", title=f"Activation magnitudes: {what}")
    plot_outliers(baseline.activations, after, plots / f"outliers{suffix}.png", title=f"Outliers: {what}")


def _write(folder: Path, configs: Sequence[Config], baseline: Baseline, outcomes: Sequence[Outcome], title: str) -> None:
    rows = [baseline.row, *(outcome.row for outcome in outcomes)]
    plot_block_errors({outcome.key: outcome.errors for outcome in outcomes}, folder / "plots" / "block_errors.png")
    (folder / "table.md").write_text(markdown_table(rows, title=title), encoding="utf-8")
    for path, text in config_files(configs).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    write_json(
        folder / "environment.json",
        {
            **diagnostics(),
            "seed": configs[0].seed,
            "device": str(baseline.model.device),
            "dtype": configs[0].dtype,
            "processes": world_size(),
        },
    )
    results = [{**row_dict(baseline.row), "block_errors": [0.0] * len(baseline.trace.residuals)}]
    results += [
        {**row_dict(outcome.row), "calibration": outcome.calibration, "block_errors": outcome.errors} for outcome in outcomes
    ]
    write_json(folder / "metrics.json", {"title": title, "model": configs[0].model, "results": results})


def row_dict(row: Row) -> dict[str, Any]:
    """A row as plain values, for metrics.json."""
    return {
        "method": row.method,
        "setting": row.setting,
        "total_seconds": row.seconds,
        "evaluation": row.evaluation.as_dict(),
    }
