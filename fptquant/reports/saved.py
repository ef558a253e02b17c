"""Evaluates calibrated models that were saved, against the full-precision model that they all come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from fptquant.config.loading import dump_config, load_config
from fptquant.config.schema import Config
from fptquant.config.tables import FULL_PRECISION
from fptquant.data.windows import check_window
from fptquant.diagnostics import diagnostics
from fptquant.errors import UserError
from fptquant.evaluation.cost import runtime_cost
from fptquant.evaluation.evaluate import build_reference, evaluate_windows
from fptquant.evaluation.teacher import ProgressCallback
from fptquant.evaluation.zero_shot import kept_tasks
from fptquant.files import KeptFiles
from fptquant.models.folders import find_saved
from fptquant.models.loading import load_model
from fptquant.models.saving import load_calibrated
from fptquant.reports.experiment import DTYPES
from fptquant.reports.further import Further, FurtherMeasurements
from fptquant.reports.processes import resolve_device
from fptquant.reports.progress import Labeled
from fptquant.reports.run_folder import write_json
from fptquant.reports.samples import Samples, samples_markdown
from fptquant.reports.table import Row, markdown_table
from fptquant.reports.unfinished_run import EVALUATION, check_run, lasting_run_folder
from fptquant.reports.zero_shot import zero_shot_markdown

_NOTHING = Further()


@dataclass(frozen=True)
class SavedEvaluation:
    """The rows of one table, full precision first, and samples of text."""

    rows: list[Row]
    samples: Samples | None
    """What the models said, if they were asked."""


def check_evaluation(paths: Sequence[str | Path]) -> dict[Path, Config]:
    """The folders of the models with their configs, which must name one full-precision model.

    Raises:
        UserError: if a folder holds no calibrated model, is given twice, or comes from another model.
    """
    configs: dict[Path, Config] = {}
    for path in paths:
        folder = find_saved(path)
        if folder in configs:
            raise UserError(f"{folder} is given twice; give each calibrated model once")
        configs[folder] = load_config(folder / "config.yaml")
    models = {config.model for config in configs.values()}
    if len(models) != 1:
        raise UserError(f"the models come from different ones ({', '.join(sorted(models))}); evaluate each kind by itself")
    return configs


def evaluate_saved(
    paths: Sequence[str | Path],
    *,
    text: str = "auto",
    windows: int | Literal["all"] = 8,
    window: int = 1024,
    device: str = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    further: Further = _NOTHING,
    progress: ProgressCallback,
) -> SavedEvaluation:
    """The rows of one table: the full-precision model, and each of the saved ones, on the same text.

    Args:
        paths: run folders, or folders that ``CalibrationResult.save`` or `fptquant.calibrate_streamed` wrote.
        further: zero-shot tasks and samples, for each of the models; none by default.
        output: a folder for table, metrics and configs; none is written by default.
        resume: go on with an evaluation into the same folder that was killed.

    Raises:
        UserError: before any long work, as `check_evaluation`, and if the text is too short, a task cannot be had, or the output
            cannot be written.
    """
    configs = check_evaluation(paths)
    asked: dict[str, Any] = {"text": text, "windows": windows, "window": window}
    asked_for = {**asked, **further.description(), "models": [str(folder) for folder in configs]}
    description = {"evaluation.yaml": yaml.safe_dump(asked_for, sort_keys=False)}
    if output is not None:
        check_run(output, description, overwrite=overwrite, resume=resume)
    elif resume:
        raise UserError("only an evaluation with an output folder leaves what can be gone on with; leave out --resume")
    measurements = FurtherMeasurements(further, windows, progress)
    if output is None:
        return _evaluate(configs, asked, measurements, resolve_device(device), None, progress)
    with lasting_run_folder(output, description, overwrite=overwrite, resume=resume, lasting=()) as folder:
        found = _evaluate(configs, asked, measurements, resolve_device(device), KeptFiles(folder / EVALUATION), progress)
        _write(folder, configs, found, device)
    return found


def _evaluate(
    configs: Mapping[Path, Config],
    asked: Mapping[str, Any],
    further: FurtherMeasurements,
    device: torch.device,
    kept: KeptFiles | None,
    progress: ProgressCallback,
) -> SavedEvaluation:
    first = next(iter(configs.values()))
    model, tokenizer = load_model(first.model, dtype=DTYPES[first.dtype], device=device)
    longest = max(len(config.quantization.prefix or ()) for config in configs.values())
    check_window(model.config, asked["window"] + longest, f"the evaluation window with a prefix of {longest} tokens")
    further.check(tokenizer)
    cache, evaluation = build_reference(model, tokenizer, **asked, progress=progress, kept=kept)
    row = Row(FULL_PRECISION, first.dtype, evaluation, evaluation.seconds)
    labeled = Labeled(progress, "full precision: ")
    rows = [further.measure(model, tokenizer, row, cache.tokens, kept_tasks(kept, "0"), labeled)]
    del model
    for number, (folder, config) in enumerate(configs.items(), start=1):
        calibrated, tokenizer = load_calibrated(folder, device=str(device))
        labeled = Labeled(progress, f"{config.name} {config.quantization.label}: ")
        file = None if kept is None else kept.file(f"{number}.json")
        found = evaluate_windows(calibrated, cache.tokens, text_name=cache.text_name, reference=cache, progress=labeled, kept=file)
        seconds, cost = _calibration_seconds(folder) + found.seconds, runtime_cost(calibrated, config)
        row = Row(config.name, config.quantization.setting, found, seconds, cost=cost)
        rows.append(further.measure(calibrated, tokenizer, row, cache.tokens, kept_tasks(kept, str(number)), labeled))
        del calibrated
    return SavedEvaluation(rows, further.samples)


def _calibration_seconds(folder: Path) -> float:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return float(metrics["seconds"])


def _write(folder: Path, configs: Mapping[Path, Config], found: SavedEvaluation, device: str) -> None:
    model, rows = next(iter(configs.values())).model, found.rows
    (folder / "table.md").write_text(markdown_table(rows, title=f"evaluation: {model}"), encoding="utf-8")
    (folder / "configs").mkdir()
    for number, config in enumerate(configs.values(), start=1):
        file = folder / "configs" / f"{number}-{config.name}-{config.quantization.label}.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
    write_json(folder / "environment.json", {**diagnostics(), "device": device})
    results = [row.as_dict() for row in rows]
    for result, path in zip(results[1:], configs, strict=True):
        result["folder"] = str(path)
    if any(row.zero_shot for row in rows):
        (folder / "zero_shot.md").write_text(zero_shot_markdown(rows, title=f"zero-shot tasks: {model}"), encoding="utf-8")
    if found.samples is not None:
        (folder / "samples.md").write_text(samples_markdown(found.samples, title=f"samples: {model}"), encoding="utf-8")
    write_json(folder / "metrics.json", {"title": "evaluation", "model": model, "results": results})
