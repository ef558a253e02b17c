"""Evaluates calibrated models that were saved, against the full-precision model that they all come from."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fptquant.config.loading import dump_config, load_config
from fptquant.config.schema import Config
from fptquant.data.windows import check_window
from fptquant.diagnostics import diagnostics
from fptquant.errors import UserError
from fptquant.evaluation.evaluate import build_reference, evaluate_windows
from fptquant.evaluation.teacher import ProgressCallback
from fptquant.models.loading import load_model
from fptquant.models.saving import check_saved, load_calibrated
from fptquant.reports.experiment import DTYPES, row_dict
from fptquant.reports.processes import resolve_device
from fptquant.reports.progress import Labeled
from fptquant.reports.run_folder import check_output, run_folder, write_json
from fptquant.reports.table import Row, markdown_table


def find_saved(path: str | Path) -> Path:
    """The folder of a calibrated model: this one, or the ``model`` of a run folder.

    Raises:
        UserError: if neither holds one.
    """
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if check_saved(candidate):
            return candidate
    raise UserError(
        f"{path} holds no calibrated model; give a run folder of `fptquant run` (without --no-save), or a folder that save() wrote"
    )


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
    progress: ProgressCallback,
) -> list[Row]:
    """The rows of one table: the full-precision model, and each of the saved ones, on the same text.

    Args:
        paths: run folders, or folders that ``CalibrationResult.save`` or `fptquant.calibrate_streamed` wrote.
        output: a folder for table, metrics and configs; none is written by default.

    Raises:
        UserError: before any long work, as `check_evaluation`, and if the text is too short or the output cannot be written.
    """
    configs = check_evaluation(paths)
    if output is not None:
        check_output(output, overwrite=overwrite)
    first, where = next(iter(configs.values())), resolve_device(device)
    model, tokenizer = load_model(first.model, dtype=DTYPES[first.dtype], device=where)
    longest = max(len(config.quantization.prefix or ()) for config in configs.values())
    check_window(model.config, window + longest, f"the evaluation window with a prefix of {longest} tokens")
    cache, evaluation = build_reference(model, tokenizer, text=text, windows=windows, window=window, progress=progress)
    rows = [Row("full precision", first.dtype, evaluation, evaluation.seconds)]
    del model
    for folder, config in configs.items():
        started = time.perf_counter()
        calibrated, _ = load_calibrated(folder, device=str(where))
        labeled = Labeled(progress, f"{config.name} {config.quantization.label}: ")
        found = evaluate_windows(calibrated, cache.tokens, text_name=cache.text_name, reference=cache, progress=labeled)
        seconds = _calibration_seconds(folder) + time.perf_counter() - started
        rows.append(Row(config.name, config.quantization.setting, found, seconds))
        del calibrated
    if output is not None:
        _write(output, configs, rows, str(where), overwrite=overwrite)
    return rows


def _calibration_seconds(folder: Path) -> float:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return float(metrics["seconds"])


def _write(output: str | Path, configs: dict[Path, Config], rows: Sequence[Row], device: str, *, overwrite: bool) -> None:
    model = next(iter(configs.values())).model
    with run_folder(output, overwrite=overwrite) as folder:
        (folder / "table.md").write_text(markdown_table(rows, title=f"evaluation: {model}"), encoding="utf-8")
        (folder / "configs").mkdir()
        for number, config in enumerate(configs.values(), start=1):
            file = folder / "configs" / f"{number}-{config.name}-{config.quantization.label}.yaml"
            file.write_text(dump_config(config), encoding="utf-8")
        write_json(folder / "environment.json", {**diagnostics(), "device": device})
        results = [row_dict(row) for row in rows]
        for result, path in zip(results[1:], configs, strict=True):
            result["folder"] = str(path)
        write_json(folder / "metrics.json", {"title": "evaluation", "model": model, "results": results})
