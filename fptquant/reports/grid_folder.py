"""The folder of a table: one run folder for each cell, and the table of what lies in them.

runs/mine/table.yaml                       the grid, with every default written out
runs/mine/cells/MODEL/METHOD-SETTING/      a run folder as ``fptquant run`` writes it; NAME.partial while it is made
runs/mine/cells/MODEL/METHOD-SETTING.error.json, .yaml, .txt  why a cell failed, its resolved config, and where in the code if
                                           nobody foresaw it; until the cell is run again and succeeds
runs/mine/cells/MODEL/full-precision.json  what the full-precision model scored
runs/mine/cells/MODEL/checkpoint-*         what evaluations have found so far, until all cells of the model are done
runs/mine/table.md, table.csv, table.tex, metrics.json, environment.json, plots/

The table is written anew after every cell, plots are drawn at the end. A finished cell is never made again, so that a grid may
grow; a cell that failed is tried again when the same command goes on. A failure of other settings than the grid's is none.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fptquant.config.differences import differences
from fptquant.config.loading import dump_config
from fptquant.config.schema import Config
from fptquant.config.tables import Cell, TableConfig, model_folder, table_cells
from fptquant.errors import UserError
from fptquant.files import replace_file
from fptquant.reports.run_folder import RUN_MARKER, check_output, make_parents, run_folder, to_json
from fptquant.reports.unfinished_run import MAY_CHANGE, alone, partial_folder, read_mapping

GRID = "table.yaml"
"""A folder with this file holds a table."""
BASELINE = "full-precision.json"


def check_table(
    table: TableConfig, *, overwrite: bool = False, resume: bool = False, parts: Sequence[str | Path] = ()
) -> list[Cell]:
    """The cells of a grid, if it can be begun or gone on with at its output; creates nothing.

    Args:
        parts: folders of tables from which cells are to be taken.

    Raises:
        UserError: as `fptquant.config.tables.table_cells`; if the output is no place for it, holds a table that may be neither
            overwritten nor gone on with, or cells of other settings; if a part holds no table or is the output itself.
    """
    cells = table_cells(table)
    folder = Path(table.output_folder)
    _check_parts(folder, parts)
    if (folder / GRID).is_file():
        if not (overwrite or resume):
            raise UserError(
                f"{folder} holds a table; go on with --resume (finished cells are kept), or start anew with --overwrite"
            )
        with alone(folder, folder):
            pass
    elif resume:
        raise UserError(f"there is no table in {folder} yet; leave out --resume")
    check_output(folder, overwrite=True, marker=GRID)
    if resume and not overwrite:
        _check_cells(folder, cells)
    return cells


def measured_on(config: Config) -> dict[str, Any]:
    """The parts of a config that decide what the full-precision model scores, as plain values."""
    return config.model_dump(mode="json", include={"model", "dtype", "device", "evaluation"})


def _check_cells(folder: Path, cells: Sequence[Cell]) -> None:
    """Refuses a folder in which full precision or a cell, finished or not, has another config than the grid now says."""
    problems = []
    for cell in cells:
        for place in (folder / cell.folder, partial_folder(folder / cell.folder)):
            other = _other_settings(place / "config.yaml", cell)
            problems += [f"  {place.name}: {'; '.join(other)}"] if other else []
    for model, cell in {cell.model.name: cell for cell in cells}.items():
        other = _other_evaluation(folder / model_folder(cell.model) / BASELINE, cell)
        problems += [f"  {BASELINE} of {model}: {'; '.join(other)}"] if other else []
    if problems:
        raise UserError(
            "\n".join([f"{folder} has cells of other settings; set these as they were, or remove their folders:", *problems])
        )


def _other_settings(config: Path, cell: Cell) -> list[str] | None:
    """How a resolved config differs from that of a cell, what may differ left out; None if there is no such file."""
    saved = read_mapping(config)
    if saved is None:
        return None
    return differences(_with_newer_keys(saved), yaml.safe_load(dump_config(cell.config)), ignored=MAY_CHANGE)


def _other_evaluation(baseline: Path, cell: Cell) -> list[str] | None:
    """How what a full-precision model was measured on differs from a cell's; None if it was not measured."""
    saved = read_mapping(baseline)
    return None if saved is None else differences(saved["of"], measured_on(cell.config))


def _check_parts(folder: Path, parts: Sequence[str | Path]) -> None:
    for part in map(Path, parts):
        if not (part / GRID).is_file():
            raise UserError(f"{part} holds no table ({GRID} is not there); give the folder that fptquant table wrote")
        if part.resolve() == folder.resolve():
            raise UserError(f"{part} is the output itself, whose finished cells --resume keeps; give the folders of other tables")


def take_cells(folder: Path, cells: Sequence[Cell], parts: Sequence[Path]) -> list[str]:
    """Copies what a table lacks from tables that have it finished with the same settings; returns what was left there, and why.

    The first part that has a cell gives it. Its config says afterwards what the table says, paths of the part are gone.
    """
    left = []
    for cell in cells:
        target = folder / cell.folder
        for source in (part / cell.folder for part in parts):
            if (target / RUN_MARKER).is_file():
                break
            other = _other_settings(source / "config.yaml", cell) if (source / RUN_MARKER).is_file() else None
            if other:
                left.append(f"left where it is: {source}: {'; '.join(other)}")
            elif other is not None:
                _take_cell(source, target, cell)
    for cell in {cell.model.name: cell for cell in cells}.values():
        target = folder / model_folder(cell.model) / BASELINE
        for source in (part / model_folder(cell.model) / BASELINE for part in parts):
            if not target.is_file() and _other_evaluation(source, cell) == []:
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_file(target, source.read_bytes())
    return left


def _take_cell(source: Path, target: Path, cell: Cell) -> None:
    with run_folder(target) as copy:
        shutil.copytree(source, copy, dirs_exist_ok=True)
        (copy / "config.yaml").write_text(dump_config(cell.config), encoding="utf-8")
    shutil.rmtree(partial_folder(target), ignore_errors=True)
    forget_failure(target)


@dataclass(frozen=True)
class Failure:
    """Why a cell is not there."""

    error: str
    config: Path
    """Its resolved config."""


def note_failure(run: Path, cell: Cell, error: Exception) -> str:
    """Writes down why a cell failed, beside its run folder; returns the reason.

    The config is written first: what is read later is there as soon as the error is.
    """
    config, trace = (_of_failure(run, suffix) for suffix in ("yaml", "txt"))
    if isinstance(error, UserError):
        reason = str(error)
        trace.unlink(missing_ok=True)
    else:  # a mistake of ours: where it happened is worth knowing
        reason = f"{type(error).__name__}: {error}"
        replace_file(trace, "".join(traceback.format_exception(error)).encode())
    replace_file(config, dump_config(cell.config).encode())
    replace_file(_of_failure(run, "json"), to_json({"error": " ".join(reason.split()), "config": config.name}).encode())
    return reason


def read_failure(run: Path, cell: Cell) -> Failure | None:
    """Why a cell failed the last time that it was run with its present settings; None if it did not."""
    file = _of_failure(run, "json")
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    config = run.with_name(found["config"])
    return Failure(found["error"], config) if _other_settings(config, cell) == [] else None


def forget_failure(run: Path) -> None:
    """Removes what `note_failure` has written."""
    for suffix in ("json", "yaml", "txt"):
        _of_failure(run, suffix).unlink(missing_ok=True)


def _of_failure(run: Path, suffix: str) -> Path:
    return run.with_name(f"{run.name}.error.{suffix}")


def _with_newer_keys(saved: dict[str, Any]) -> dict[str, Any]:
    """A config as it was saved, keys that are newer than it at their defaults; as it is if it holds others that are gone."""
    try:
        found: dict[str, Any] = yaml.safe_load(dump_config(Config.model_validate(saved)))
    except ValidationError:
        return saved
    return found


@contextmanager
def grid_folder(folder: Path, *, anew: bool) -> Iterator[None]:
    """The table's folder, which no other process works on meanwhile."""
    make_parents(folder.parent)
    folder.mkdir(exist_ok=True)
    with alone(folder, folder):
        # the mark last: a folder without it, after a kill, would be nobody's
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == GRID) if anew else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield
