"""Folders of runs that may be killed: what was done stays in ``NAME.partial`` beside the output until the run is finished.

runs/mine.partial/config.yaml       what is run
runs/mine.partial/checkpoint*       from where it goes on: of training (`fptquant.training.checkpoint`) and the stages before it
                                    (`fptquant.stages.prepared`); folders of rounding (`fptquant.rounding.round_blocks`), of
                                    evaluations (`fptquant.evaluation.scores`), and where a model larger than memory is calibrated
                                    (`fptquant.stages.stream`)
runs/mine.partial/checkpoint_effort_N.json  what process N has taken (`fptquant.reports.effort`); alone not worth keeping
runs/mine.partial/metrics.jsonl     what training has seen so far
runs/mine.partial/range_training/   checkpoint and metrics.jsonl of range training; block_training/ likewise of each block
and whatever else was written. In the end, the folder without its checkpoints is renamed to runs/mine.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fptquant.config.differences import differences
from fptquant.config.loading import dump_config
from fptquant.config.schema import Config
from fptquant.config.training import TRAINING_STAGES, WITHOUT_INFLUENCE
from fptquant.errors import UserError
from fptquant.reports.run_folder import RUN_MARKER, check_output, disk_errors, make_parents, remove_empty, replace_folder

CHECKPOINT = "checkpoint"
"""Names that begin so belong to the unfinished run alone; a file of this name, whatever its suffix, makes it worth keeping."""
EVALUATION = f"{CHECKPOINT}-evaluation"
"""Folder of what evaluations have found so far; what lies in a folder ``checkpoint-*`` makes a run worth keeping, too."""
_OF_TRAINING = ("metrics.jsonl", "tensorboard", "block_training", "range_training")
"""What the next part of a run that trains needs besides its checkpoints; everything else is made again."""
_KEPT = "what was written until the last checkpoint is kept"
MAY_CHANGE = {"output", *(f"{stage}.{key}" for stage in TRAINING_STAGES for key in WITHOUT_INFLUENCE)}
"""What may differ when a run goes on."""

Description = Mapping[str, str]
"""Paths inside a run folder and the YAML that says there what is run."""


def config_files(config: Config) -> dict[str, str]:
    """The config as YAML, by the path that it has in the run folder."""
    return {"config.yaml": dump_config(config)}


def stream_description(config: Config) -> dict[str, str]:
    """The same for a run that streams; not at the place of the finished folder's config, in which a prefix stands as its ids."""
    return {f"{CHECKPOINT}/config.yaml": dump_config(config)}


def partial_folder(path: str | Path) -> Path:
    """Where the run with this output is kept until it is finished."""
    target = Path(path).absolute()
    return target.with_name(f"{target.name}.partial")


def check_run(
    path: str | Path, description: Description, *, overwrite: bool = False, resume: bool = False, needed_bytes: int = 0
) -> None:
    """Refuses what cannot be begun or gone on with at this output; creates nothing.

    Raises:
        UserError: as `fptquant.reports.run_folder.check_output`; if another process works on the same run; without ``resume``,
            if an unfinished run is there that may not be overwritten; with it, if there is none, or it has another description.
    """
    partial = partial_folder(path)
    if partial.is_dir():
        with alone(partial, Path(path)):
            pass
    if resume:
        if not partial.is_dir():
            if (Path(path) / RUN_MARKER).is_file():
                raise UserError(f"the run {path} is finished; leave out --resume and give --overwrite to run it again")
            raise UserError(f"there is no unfinished run {partial} (it takes a minute to leave one); leave out --resume")
        _check_description(partial, description)
    elif partial.exists() and not overwrite:
        raise UserError(f"{partial} holds an unfinished run; go on with --resume, or start anew with --overwrite")
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    check_output(path, overwrite=overwrite, needed_bytes=needed_bytes - written)


def is_begun(path: str | Path) -> bool:
    """Whether an unfinished run with this output says what it is; if not, there is nothing to go on with."""
    return read_mapping(partial_folder(path) / "config.yaml") is not None


def read_mapping(file: Path) -> dict[str, Any] | None:
    """The mapping that a YAML or JSON file holds; None if there is none, whole."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _check_description(partial: Path, description: Description) -> None:
    for name, text in description.items():
        saved = read_mapping(partial / name)
        if saved is None:
            raise UserError(f"{partial / name} is missing or damaged; start anew with --overwrite")
        other = differences(saved, yaml.safe_load(text), ignored=MAY_CHANGE)
        if other:
            raise UserError(
                f"the unfinished run {partial} has another {Path(name).stem} ({'; '.join(other)}); "
                "set these as they were, or start anew with --overwrite"
            )


@contextmanager
def lasting_run_folder(
    path: str | Path,
    description: Description,
    *,
    overwrite: bool = False,
    resume: bool = False,
    lasting: Collection[str] = _OF_TRAINING,
    needed_bytes: int = 0,
) -> Iterator[Path]:
    """A folder ``NAME.partial`` to write a run into; it becomes ``path`` when the block ends.

    If the block fails and has written a checkpoint, the folder stays, and the error gets a note that says how to go on; a
    process that is killed leaves it too. Without a checkpoint nothing is worth keeping.

    Args:
        lasting: what the next part of the run finds again besides the checkpoints; the rest is removed before it begins.

    Raises:
        UserError: as `check_run`, and when the disk fills up.
    """
    target, partial = Path(path).absolute(), partial_folder(path)
    check_run(path, description, overwrite=overwrite, resume=resume, needed_bytes=needed_bytes)
    made = make_parents(target.parent)
    with disk_errors(target, _KEPT):
        partial.mkdir(exist_ok=True)
    with disk_errors(target, _KEPT), alone(partial, target):
        try:
            with disk_errors(target, _KEPT):  # here too, so that the note below is on the error that the user sees
                _prepare(partial, description, lasting, resume)
                yield partial
                for checkpoint in list(partial.rglob(f"{CHECKPOINT}*")):
                    _remove(checkpoint)
                replace_folder(target, partial)
        except BaseException as error:
            if not note_checkpoint(error, partial):
                shutil.rmtree(partial, ignore_errors=True)
                remove_empty(made)
            raise


def _prepare(partial: Path, description: Description, lasting: Collection[str], resume: bool) -> None:
    """Removes what is made again, and writes down what is run, unless it stands there already: a kill must not damage it."""
    kept = {*lasting, *(Path(name).parts[0] for name in description)} if resume else set()
    for entry in list(partial.iterdir()):
        if entry.name not in kept and not (resume and entry.name.startswith(CHECKPOINT)):
            _remove(entry)
    if not resume:
        for name, text in description.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")


def note_checkpoint(error: BaseException, partial: Path) -> bool:
    """Adds to an error how the run in this folder goes on, if it has a checkpoint; returns whether it has."""
    found = any(path.is_file() for path in (*partial.rglob(f"{CHECKPOINT}[.-]*"), *partial.rglob(f"{CHECKPOINT}-*/*")))
    if found:
        error.add_note(f"the run until its last checkpoint is kept in {partial}: the same command with --resume goes on")
    return found


@contextmanager
def alone(folder: Path, target: Path) -> Iterator[None]:
    """Holds a lock on a folder, which ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {target}; wait for it, or give another folder with output=FOLDER"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # with a checkpoint folder that was removed before it
