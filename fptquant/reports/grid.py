"""Runs every cell of a table; `fptquant.reports.grid_folder` says where what comes of it lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fptquant.config.loading import dump_config
from fptquant.config.tables import FULL_PRECISION, Cell, TableConfig, TableModel, model_folder
from fptquant.diagnostics import diagnostics
from fptquant.errors import ProcessLost, UserError
from fptquant.files import replace_file
from fptquant.reports.experiment import Baseline, measure_baseline, needed_bytes, open_model, preflight, results_folder, run_config
from fptquant.reports.grid_folder import (
    BASELINE,
    GRID,
    check_table,
    forget_failure,
    grid_folder,
    measured_on,
    note_failure,
    read_failure,
    take_cells,
)
from fptquant.reports.plots import plot_block_error_map, plot_block_errors, plot_cost
from fptquant.reports.progress import Labeled, Progress
from fptquant.reports.run_folder import RUN_MARKER, check_output, to_json
from fptquant.reports.table import Row, csv_table, latex_table, markdown_table
from fptquant.reports.unfinished_run import EVALUATION, is_begun
from fptquant.reports.zero_shot import zero_shot_markdown
from fptquant.stages.distributed import is_main, main_holds, on_main, world_size
from fptquant.stages.progress import Progress as ProgressCallback
from fptquant.stages.progress import say

_COST_PLOT = "plots/cost.png"
"""Where accuracy is drawn against cost, in the table's folder."""
_CURVES = 8
"""Cells whose errors are drawn as curves; more become a map."""


@dataclass(frozen=True)
class Table:
    """What has been measured of a grid, and where it lies."""

    rows: list[Row]
    folder: Path

    @property
    def failed(self) -> list[Row]:
        """The rows of cells that failed, with their errors."""
        return [row for row in self.rows if row.error is not None]


def make_table(
    table: TableConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    save: bool = False,
    parts: Sequence[str | Path] = (),
    run: bool = True,
    progress: ProgressCallback | None = None,
) -> Table:
    """Runs every cell of a grid that is not finished, and writes the table.

    A cell that fails is reported in its row and does not stop the others, unless several processes work together. A grid can be
    shared out: ``parts`` are folders of tables with some of its methods, settings or models, made elsewhere.

    Args:
        overwrite: begin with an empty folder; what it holds is lost.
        resume: keep the cells that are finished, go on with the one that was under way.
        save: write each calibrated model into its cell.
        parts: folders of other tables; cells that are finished there with the same settings are copied, not run.
        run: False writes the table of what is finished, and runs nothing.
        progress: called as ``progress(done, total, description)``; a progress bar by default.

    Raises:
        UserError: as `check_table`, before anything is done; if a table is to be overwritten and its first model cannot be had.

    Example:
        >>> made = make_table(load_table("demo", "settings=[w4a16]"))  # doctest: +SKIP
    """
    if progress is None:
        with Progress() as bars:
            return make_table(table, overwrite=overwrite, resume=resume, save=save, parts=parts, run=run, progress=bars)
    folder = Path(table.output_folder).absolute()
    cells = on_main(lambda: check_table(table, overwrite=overwrite, resume=resume, parts=parts))
    if overwrite and run and on_main((folder / GRID).is_file):
        open_model(cells[0].config, progress)  # what is there is not given up for a model that cannot be had
    with main_holds(lambda: grid_folder(folder, anew=overwrite or not resume)):
        if is_main():
            replace_file(folder / GRID, dump_config(table).encode())
        for line in on_main(lambda: take_cells(folder, cells, [Path(part) for part in parts])):
            say(progress, line)
        grid = _Grid(folder, table, cells, set())
        for model in dict.fromkeys(cell.model.name for cell in cells) if run else ():
            _run_model(grid, [cell for cell in cells if cell.model.name == model], save, progress)
        on_main(grid.plot)
        on_main(grid.write)
    return Table(on_main(grid.rows), Path(table.output_folder))


@dataclass(frozen=True)
class _Grid:
    """A grid and what has become of its cells."""

    folder: Path
    table: TableConfig
    cells: Sequence[Cell]
    failed: set[str]
    """Folders of the cells that this process need not try again."""

    def finished(self, cell: Cell) -> bool:
        return (self.folder / cell.folder / RUN_MARKER).is_file()

    def rows(self) -> list[Row]:
        """For every model full precision, each cell that is finished or has failed, and what papers alone have measured."""
        found: list[Row] = []
        for model in self.table.models:
            cells = [cell for cell in self.cells if cell.model == model]
            rows = [self._full_precision(model), *map(self._row, cells)]
            found += [self._complete(row, model, setting) for row, setting in rows if row is not None]
            found += self._published_alone(model, {(row.method, setting) for row, setting in rows if row is not None})
        return found

    def _full_precision(self, model: TableModel) -> tuple[Row | None, str | None]:
        file = self.folder / model_folder(model) / BASELINE
        return Row.from_dict(json.loads(file.read_text(encoding="utf-8"))["row"]) if file.is_file() else None, None

    def _row(self, cell: Cell) -> tuple[Row | None, str]:
        if self.finished(cell):
            row = Row.from_dict(_results(self.folder / cell.folder)[1])
            return replace(row, config=f"{cell.folder}/config.yaml"), cell.setting
        failure = read_failure(self.folder / cell.folder, cell)
        if failure is None:
            return None, cell.setting
        config = failure.config.relative_to(self.folder).as_posix()
        return Row(cell.config.name, cell.config.quantization.setting, None, None, config=config, error=failure.error), cell.setting

    def _published_alone(self, model: TableModel, measured: set[tuple[str, str | None]]) -> Iterator[Row]:
        for value in self.table.published:
            if value.model == model.name and not any(value.is_of(model.name, *cell) for cell in measured):
                row = Row(value.method, value.setting or "-", None, None)
                yield self._complete(row, model, value.setting)

    def _complete(self, row: Row, model: TableModel, setting: str | None) -> Row:
        several = len(self.table.models) > 1
        row = replace(row, model=model.name if several else None)
        value = self.table.published_value(model.name, row.method, setting)
        return row if value is None else replace(row, published=value.perplexity, source=value.source)

    def state(self, rows: Sequence[Row]) -> str:
        """How many cells there are of those that the grid has; empty if it is complete."""
        done, failed = sum(map(self.finished, self.cells)), sum(row.error is not None for row in rows)
        if done == len(self.cells):
            return ""
        return f"{done} of {len(self.cells)} cells" + (f", {failed} failed" if failed else "")

    def write(self) -> None:
        """Writes the table's texts as things stand."""
        rows = self.rows()
        state = self.state(rows)
        title = self.table.name if len(self.table.models) > 1 else f"{self.table.name}: {self.table.models[0].model}"
        picture = _COST_PLOT if (self.folder / _COST_PLOT).is_file() else None
        results = {"title": title, "results": [row.as_dict() for row in rows]}
        files = {
            "table.md": markdown_table(rows, title=title, state=state, picture=picture),
            "table.csv": csv_table(rows),
            "table.tex": latex_table(rows, title=title, state=state),
            RUN_MARKER: to_json(results),
            "environment.json": to_json(diagnostics()),
        }
        if any(row.zero_shot for row in rows):
            files["zero_shot.md"] = zero_shot_markdown(rows, title=f"zero-shot tasks: {title}")
        for name, text in files.items():
            replace_file(self.folder / name, text.encode())

    def plot(self) -> None:
        """Draws what is finished."""
        done = [cell for cell in self.cells if self.finished(cell)]
        errors = {cell.folder.removeprefix("cells/"): _results(self.folder / cell.folder)[1]["block_errors"] for cell in done}
        plots = self.folder / "plots"
        plots.mkdir(exist_ok=True)
        if done:
            plot_errors = plot_block_errors if len(done) <= _CURVES else plot_block_error_map
            plot_errors(errors, plots / "block_errors.png")
            plot_cost(self.rows(), self.folder / _COST_PLOT, title=self.table.name)


def _results(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / RUN_MARKER).read_text(encoding="utf-8"))["results"]
    return found


def _run_model(grid: _Grid, cells: Sequence[Cell], save: bool, progress: ProgressCallback) -> None:
    """All cells of one model that are not finished."""
    here = grid.folder / model_folder(cells[0].model)
    missing: list[Cell] = on_main(lambda: [cell for cell in cells if not grid.finished(cell)])
    if missing or not on_main((here / BASELINE).is_file):
        baseline: list[Baseline] = []
        with _failing(grid, missing, progress):
            baseline.append(_open(grid, missing or cells[:1], here, save, progress))
        ready = [cell for cell in missing if cell.folder not in grid.failed] if baseline else []
        for cell in ready:
            with _failing(grid, [cell], progress):
                _run_cell(baseline[0], grid.folder, cell, save, progress, last=cell is ready[-1])
            on_main(grid.write)
    if is_main() and all(map(grid.finished, cells)):
        shutil.rmtree(here / EVALUATION, ignore_errors=True)


@contextmanager
def _failing(grid: _Grid, cells: Sequence[Cell], progress: ProgressCallback, *, alike: bool = False) -> Iterator[None]:
    """Notes an error for the cells that it strikes; with several processes, which would wait for each other, it ends them all.

    Args:
        alike: what the user can mend is found by every process in the same way: nobody waits.
    """
    try:
        yield
    except Exception as error:
        apart = world_size() > 1 and not (alike and isinstance(error, UserError))
        if apart or isinstance(error, ProcessLost) or not cells:
            raise
        for cell in cells:
            grid.failed.add(cell.folder)
            if is_main():
                reason = note_failure(grid.folder / cell.folder, cell, error)
                say(progress, f"failed: {cell.folder.removeprefix('cells/')}: {reason}")


def _open(grid: _Grid, cells: Sequence[Cell], here: Path, save: bool, progress: ProgressCallback) -> Baseline:
    """The full-precision model, measured; cells that ask of it what cannot be have failed."""
    if is_main():
        here.mkdir(parents=True, exist_ok=True)
    opened = open_model(cells[0].config, progress)
    for cell in cells:
        with _failing(grid, [cell], progress, alike=True):
            preflight(opened, cell.config)
    needed = needed_bytes(opened, [cell.config for cell in cells], save=save)
    on_main(lambda: check_output(grid.folder, overwrite=True, marker=GRID, needed_bytes=needed))
    labeled = Labeled(progress, f"{cells[0].model.name}: ") if len(grid.table.models) > 1 else progress
    baseline = measure_baseline(opened, cells[0].config, here / EVALUATION, labeled)
    if is_main():
        row = replace(baseline.row, method=FULL_PRECISION).as_dict()
        replace_file(here / BASELINE, to_json({"row": row, "of": measured_on(cells[0].config)}).encode())
    return baseline


def _run_cell(baseline: Baseline, folder: Path, cell: Cell, save: bool, progress: ProgressCallback, *, last: bool) -> None:
    output = folder / cell.folder
    under_way = on_main(lambda: is_begun(output))
    labeled = Labeled(progress, f"{cell.folder.removeprefix('cells/')}: ")
    with results_folder(cell.config, output, overwrite=not under_way, resume=under_way) as partial:
        # The last one needs no copy: nobody asks the full-precision model any more.
        title = f"{cell.config.name} on {cell.config.model}"
        run_config(baseline, cell.config, partial, labeled, title=title, resume=under_way, save=save, in_place=last)
        if is_main():
            forget_failure(output)
