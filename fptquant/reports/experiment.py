"""A run from beginning to end: check, load, measure in full precision, calibrate, measure again, write it all down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptquant.config.labels import AUTO_PREFIX
from fptquant.config.schema import Config
from fptquant.config.tables import FULL_PRECISION
from fptquant.diagnostics import diagnostics
from fptquant.evaluation.cost import runtime_cost
from fptquant.evaluation.evaluate import build_reference, evaluate_windows, evaluation_windows
from fptquant.evaluation.teacher import ProgressCallback, TeacherCache
from fptquant.evaluation.zero_shot import ZeroShot, check_tokenizer, evaluate_zero_shot, kept_tasks
from fptquant.evaluation.zero_shot_tasks import load_tasks, parse_tasks
from fptquant.files import KeptFile, KeptFiles
from fptquant.models.architectures import view_model
from fptquant.models.loading import load_model
from fptquant.models.saving import CalibrationResult
from fptquant.reports.effort import EffortMeter
from fptquant.reports.plots import plot_activations, plot_block_errors, plot_outliers
from fptquant.reports.processes import resolve_device
from fptquant.reports.run_folder import RUN_MARKER, write_json
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
from fptquant.reports.zero_shot import zero_shot_markdown
from fptquant.rounding.round_weights import check_rounding, rounding_bytes
from fptquant.stages.calibrate import calibrate, calibration_windows, check_model
from fptquant.stages.distributed import is_main, main_first, main_holds, on_main, world_size
from fptquant.stages.find_prefix import check_prefix
from fptquant.training.train import check_training

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
class Opened:
    """A full-precision model, and what it is going to be evaluated on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor
    """[windows, window], int64"""
    tasks: dict[str, Any]
    """lm-eval's, by name; in the main process alone."""


@dataclass(frozen=True)
class Baseline:
    """The full-precision model, and what it does on the evaluation text."""

    opened: Opened
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
    config: Config,
    *,
    title: str,
    output: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    save: bool = False,
    progress: ProgressCallback,
) -> Experiment:
    """Runs a config and writes a run folder; with ``save`` the calibrated model is written into it.

    A run that lasts can be killed, and goes on with ``resume``.

    Raises:
        UserError: for everything that can be known to fail, before any long work begins.
    """
    description = config_files(config)
    on_main(lambda: check_run(output, description, overwrite=overwrite, resume=resume, needed_bytes=_REPORT_BYTES))
    opened = open_model(config, progress)
    preflight(opened, config)
    needed = needed_bytes(opened, [config], save=save)
    on_main(lambda: check_run(output, description, overwrite=overwrite, resume=resume, needed_bytes=needed))
    with results_folder(config, output, overwrite=overwrite, resume=resume) as folder:
        baseline = measure_baseline(opened, config, folder / EVALUATION, progress)
        row = run_config(baseline, config, folder, progress, title=title, resume=resume, save=save, in_place=True)
    return Experiment([baseline.row, row], Path(output))


def open_model(config: Config, progress: ProgressCallback) -> Opened:
    """A config's full-precision model, the evaluation windows, and its zero-shot tasks.

    Raises:
        UserError: if one of them cannot be had, or the window is longer than the model's context.
    """
    device, settings = resolve_device(config.device), config.evaluation
    with main_first():  # models and texts are fetched once
        model, tokenizer = load_model(config.model, dtype=DTYPES[config.dtype], device=device)
        windows, _ = evaluation_windows(model, tokenizer, settings.text, settings.windows, settings.window)
    opened = Opened(model, tokenizer, windows, {})
    if settings.zero_shot is not None:
        specs = parse_tasks(settings.zero_shot.tasks)
        check_tokenizer(tokenizer)
        on_main(lambda: opened.tasks.update(load_tasks(specs, progress)))
    return opened


@contextmanager
def results_folder(config: Config, output: str | Path, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """The folder that the run is written into, by the main process; the errors of all say how the run goes on."""

    def folder() -> AbstractContextManager[Path]:
        return lasting_run_folder(output, config_files(config), overwrite=overwrite, resume=resume)

    with main_holds(folder) as path:
        try:
            yield path
        except BaseException as error:
            if not is_main():
                note_checkpoint(error, path)
            raise


def preflight(opened: Opened, config: Config) -> None:
    """Everything that a config asks of a model and of the texts before evaluation, in seconds.

    Raises:
        UserError: if a transform does not fit the model, a Hadamard size is impossible, a window is longer than the
            model's context, a group does not divide a layer, a text is too short, or training lacks a package.
    """
    model, tokenizer = opened.model, opened.tokenizer
    check_model(model, config)
    check_training(model, config)
    check_rounding(model, config)
    with main_first():  # a text is fetched once
        windows = calibration_windows(model, tokenizer, config)
    check_prefix(model, tokenizer, config, {"calibration.window": windows.shape[1], "evaluation.window": config.evaluation.window})


def needed_bytes(opened: Opened, configs: Sequence[Config], *, save: bool) -> int:
    """Disk space that runs on one model need: for reports, saved models, and what is kept until they are finished."""
    model = opened.model
    states = opened.windows.numel() * int(model.config.hidden_size) * model.dtype.itemsize
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # Untying adds a head as large as the embedding, at most as much again; the smaller files are within the rest.
    embedding = view_model(model).embedding.weight
    saved = int(1.05 * (parameters + embedding.numel() * embedding.element_size())) if save else 0
    rounded = max(rounding_bytes(model, config) for config in configs)
    return states + rounded + len(configs) * (_REPORT_BYTES + saved)


def measure_baseline(opened: Opened, config: Config, kept_in: Path, progress: ProgressCallback) -> Baseline:
    """What the full-precision model does on the evaluation text and the tasks; what is done is kept in a folder."""
    settings, model = config.evaluation, opened.model
    kept = KeptFiles(kept_in) if world_size() == 1 else None
    shared = 1 < world_size() <= len(opened.windows)
    cache, evaluation = build_reference(
        model,
        opened.tokenizer,
        text=settings.text,
        windows=settings.windows,
        window=settings.window,
        progress=progress,
        shared=shared,
        kept=kept,
    )
    tokens = cache.tokens[0, :PLOT_TOKENS]
    zero_shot = measure_zero_shot(opened, model, config, kept_tasks(kept, "full-precision"), progress)
    row = Row(FULL_PRECISION, config.dtype, evaluation, evaluation.seconds, zero_shot=zero_shot)
    return Baseline(opened, cache, shared, kept, row, trace_residuals(model, tokens), collect_activations(model, tokens))


def measure_zero_shot(
    opened: Opened,
    model: PreTrainedModel,
    config: Config,
    kept: Callable[[str], KeptFile] | None,
    progress: ProgressCallback,
) -> ZeroShot | None:
    """What a model scores on the tasks, if there are some; the main process alone asks it."""
    settings = config.evaluation.zero_shot
    if settings is None:
        return None
    asked: dict[str, Any] = {"limit": settings.limit, "batch_size": settings.batch_size, "seed": config.seed}

    def ask() -> ZeroShot:
        scores = evaluate_zero_shot(model, opened.tokenizer, opened.tasks, **asked, progress=progress, kept=kept)
        return ZeroShot(scores, **asked)

    return on_main(ask)


def run_config(
    baseline: Baseline,
    config: Config,
    folder: Path,
    progress: ProgressCallback,
    *,
    title: str,
    resume: bool,
    save: bool,
    in_place: bool,
) -> Row:
    """Calibrates, evaluates, and writes the folder of a run.

    Args:
        in_place: the full-precision model is not needed any more.
    """
    if is_main():
        (folder / "plots").mkdir()
    searched = None
    if config.quantization.prefix == AUTO_PREFIX and config.quantization.has_prefix:
        # the search reads its windows at the beginning, wherever ranges are set
        searched = f"{config.calibration.model_copy(update={'context': None})} {config.seed}"
    cache, name = baseline.cache, f"{config.name}-{config.quantization.label}"
    with EffortMeter(folder, baseline.opened.model.device) as meter:
        result: CalibrationResult = calibrate(
            baseline.opened.model,
            baseline.opened.tokenizer,
            config,
            found_prefix=AUTO_PREFIX if searched is None else baseline.prefixes.get(searched, AUTO_PREFIX),
            in_place=in_place,
            folder=folder,
            resume=resume,
            progress=meter.watch(progress),
        )
        meter.end_memory()
        if searched is not None:
            baseline.prefixes[searched] = result.config.quantization.prefix  # type: ignore[assignment]
        evaluation = evaluate_windows(
            result.model,
            cache.tokens,
            text_name=cache.text_name,
            reference=cache,
            progress=meter.watch(progress),
            shared=baseline.shared,
            kept=None if baseline.kept is None else baseline.kept.file(f"{name}.json"),
        )
    zero_shot = measure_zero_shot(baseline.opened, result.model, config, kept_tasks(baseline.kept, name), progress)
    effort = meter.total()
    row = Row(
        config.name,
        result.config.quantization.setting,
        evaluation,
        max(effort.seconds, result.metrics["seconds"] + evaluation.seconds),  # scores are kept beside cells that are not
        cost=runtime_cost(result.model, result.config),
        cpu_seconds=effort.cpu_seconds,
        peak_bytes=effort.peak_bytes,
        cuda_peak_bytes=effort.cuda_peak_bytes,
        zero_shot=zero_shot,
    )
    errors = block_errors(baseline.trace, trace_residuals(result.model, cache.tokens[0, :PLOT_TOKENS]))
    if is_main():
        _plot(baseline, result, errors, folder / "plots")
        if save:
            result.save(folder / "model")
        _write(folder, config, baseline, row, result.metrics, errors, title)
    return row


def _plot(baseline: Baseline, result: CalibrationResult, errors: Sequence[float], plots: Path) -> None:
    config = result.config
    plot_block_errors({f"{config.name} {config.quantization.label}": errors}, plots / "block_errors.png")
    if config.transforms.used:
        _plot_magnitudes(baseline, result, plots)


def _plot_magnitudes(baseline: Baseline, result: CalibrationResult, plots: Path) -> None:
    config = result.config
    tokens = baseline.cache.tokens[0, :PLOT_TOKENS]
    after = collect_activations(result.model, tokens, map_layers=map_layers_of(baseline.activations))
    what = f"{config.model}, {config.name}, {config.quantization.label}"
    plot_activations(baseline.activations, after, plots / "activations.png", title=f"Activation magnitudes: {what}")
    plot_outliers(baseline.activations, after, plots / "outliers.png", title=f"Outliers: {what}")


def _write(
    folder: Path, config: Config, baseline: Baseline, row: Row, calibration: Mapping[str, Any], errors: Sequence[float], title: str
) -> None:
    rows = [baseline.row, row]
    (folder / "table.md").write_text(markdown_table(rows, title=title), encoding="utf-8")
    if row.zero_shot is not None:
        (folder / "zero_shot.md").write_text(zero_shot_markdown(rows, title=f"zero-shot tasks: {title}"), encoding="utf-8")
    for path, text in config_files(config).items():
        (folder / path).write_text(text, encoding="utf-8")
    device = str(baseline.opened.model.device)
    about = {"seed": config.seed, "device": device, "dtype": config.dtype, "processes": world_size()}
    write_json(folder / "environment.json", {**diagnostics(), **about})
    results = [
        {**baseline.row.as_dict(), "block_errors": [0.0] * len(baseline.trace.residuals)},
        {**row.as_dict(), "calibration": calibration, "block_errors": errors},
    ]
    write_json(folder / RUN_MARKER, {"title": title, "model": config.model, "results": results})
