"""One self-contained page about a calibrated model: what was run, what came of it, and where the error arises."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

from fptquant.config.loading import load_config
from fptquant.errors import UserError
from fptquant.files import replace_file
from fptquant.float32_products import fast_float32_products
from fptquant.models.folders import find_saved
from fptquant.reports.diagnosis import diagnose
from fptquant.reports.page import Run, render
from fptquant.reports.processes import resolve_device
from fptquant.reports.progress import Progress
from fptquant.reports.table import Row
from fptquant.stages.progress import Progress as ProgressCallback
from fptquant.training.log import METRICS
from fptquant.training.train import RANGE_FOLDER

NAME = "report.html"
WINDOW = 512
"""Tokens of a window, where the run's own windows are not shorter."""
SAMPLES = 2
"""Prompts that both models go on with, where there are so many windows."""


@fast_float32_products
def write_report(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    sensitivity: bool = True,
    per_layer: bool = False,
    text: str | None = None,
    windows: int = 2,
    window: int | None = None,
    samples: int | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> Path:
    """Measures what a calibrated model does and writes one HTML page about it, which needs no other file and no network.

    The page has the run's results, those of zero-shot tasks by task, samples of text of both models, the error of every block,
    SQNR of every quantizer, sensitivity, outliers and histograms before and after the transforms, the course of training, seconds
    and config. Written twice it is the same.

    Args:
        folder: a run folder of ``fptquant run``, or what ``CalibrationResult.save`` wrote.
        output: the page; ``report.html`` in the folder by default.
        sensitivity: evaluate the model with each kind of site quantized alone, which takes longest.
        per_layer: also with each site of each layer alone, which takes as many evaluations as there are quantizers.
        text: what is read; that of the run's evaluation by default.
        windows: how many windows are read.
        window: tokens of each; 512 or the run's own windows, whichever are shorter, by default.
        samples: how many windows give a prompt, their beginning, that both models go on with; 2 at most by default.

    Raises:
        UserError: before any long work, if the folder holds no calibrated model, the page cannot be written, or the text or the
            full-precision model cannot be found.
    """
    saved = find_saved(folder)
    page = Path(output) if output is not None else Path(folder) / NAME
    _check_page(page)
    if per_layer and not sensitivity:
        raise UserError("the sensitivity of every layer is part of the sensitivity; ask for both, or for neither")
    if samples is not None and not 0 <= samples <= windows:
        raise UserError(f"{samples} samples are not possible with {windows} windows; each begins as a window does")
    config = load_config(saved / "config.yaml")
    run = _read_run(Path(folder), saved)
    with nullcontext(progress) if progress is not None else Progress() as bars:
        diagnosis = diagnose(
            saved,
            config,
            text=config.evaluation.text if text is None else text,
            windows=windows,
            window=min(config.evaluation.window, WINDOW) if window is None else window,
            samples=min(windows, SAMPLES) if samples is None else samples,
            sensitivity=sensitivity,
            per_layer=per_layer,
            device=resolve_device(device),
            progress=bars,
        )
        bars(0, 1, "figures")
        content = render(config, run, diagnosis)
        bars(1, 1, "figures")
    try:
        replace_file(page, content.encode("utf-8"))
    except OSError as error:
        _beside(page).unlink(missing_ok=True)
        raise UserError(f"the page {page} could not be written ({error.strerror}); give another one with --output FILE") from error
    return page


def _check_page(page: Path) -> None:
    """Refuses a page that could not be written in the end, or that would replace another file."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{page} is no name of a page; give one that ends in .html")
    if page.is_dir() or not page.absolute().parent.is_dir():
        reason = "is a folder" if page.is_dir() else "lies in a folder that does not exist"
        raise UserError(f"{page} {reason}; give another file with --output FILE")
    try:
        _beside(page).touch()
        _beside(page).unlink()
    except OSError as error:
        raise UserError(f"the page {page} cannot be written ({error.strerror}); give another one with --output FILE") from error


def _beside(page: Path) -> Path:
    """The file that `replace_file` writes and renames."""
    return page.with_name(page.name + ".new")


def _read_run(folder: Path, saved: Path) -> Run:
    """Reads the files of a run.

    Raises:
        UserError: if one of them is damaged.
    """
    try:
        results = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("results", [])
        logs = {"training": folder / METRICS, "range_training": folder / RANGE_FOLDER / METRICS}
        return Run(
            [Row.from_dict(result) for result in results],
            json.loads((saved / "metrics.json").read_text(encoding="utf-8")),
            json.loads((folder / "environment.json").read_text(encoding="utf-8")),
            {key: [json.loads(line) for line in log.read_text("utf-8").splitlines()] for key, log in logs.items() if log.is_file()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the files of the run {folder} are missing or damaged ({error}); run it again") from error
