"""Run folders: everything a result needs to be understood and repeated, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fptquant.errors import UserError

RUN_MARKER = "metrics.json"
"""A folder with this file holds a run."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def check_output(path: str | Path, *, overwrite: bool = False, needed_bytes: int = 0, marker: str = RUN_MARKER) -> None:
    """Refuses an output folder that could not be written at the end of a run; creates nothing.

    Args:
        marker: the file by which a folder is known that may be overwritten.

    Raises:
        UserError: if the path holds another run (unless it may be overwritten) or anything else, if nothing can be written
            there, or if there is not enough space.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file; give the path of a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        if not (target / marker).is_file():
            raise UserError(f"output {target} holds other files than a run's; give a new folder with output=FOLDER")
        if not overwrite:
            raise UserError(f"output {target} holds another run; give a new folder with output=FOLDER, or --overwrite")
    existing = _existing_ancestor(target)
    try:
        with tempfile.TemporaryDirectory(prefix=".fptquant-", dir=existing):
            pass
    except OSError as error:
        raise UserError(f"output {target} cannot be written ({error.strerror}); give another one with output=FOLDER") from error
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"output {target} needs about {needed_bytes / 1e6:,.0f} MB, but {existing} has {free / 1e6:,.0f} MB left; "
            "free some space or give another folder with output=FOLDER"
        )


def _existing_ancestor(path: Path) -> Path:
    """The nearest folder above that exists: where the run folder would be made."""
    for folder in path.absolute().parents:
        if folder.exists():
            return folder
    return Path("/")


@contextmanager
def run_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``path`` to write a run into; it becomes ``path`` when the block ends, and vanishes if it fails.

    Raises:
        UserError: as `check_output`, and when the disk fills up while writing.
    """
    target = Path(path).absolute()
    check_output(target, overwrite=overwrite)
    made = make_parents(target.parent)
    try:
        with disk_errors(target, "nothing was left there"):
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            try:
                yield partial
                replace_folder(target, partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def disk_errors(target: Path, state: str) -> Iterator[None]:
    """Errors of a full or forbidden disk as a UserError, which says in which ``state`` the output is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"output {target} could not be written ({error.strerror}); {state}. "
            "Free some space or give another folder with output=FOLDER"
        ) from error


def make_parents(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns the ones that are new, outermost first."""
    missing, new = [], []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    try:
        for path in reversed(missing):
            with suppress(FileExistsError):  # another run has made it meanwhile
                path.mkdir()
                new.append(path)
    except OSError as error:
        remove_empty(new)
        raise UserError(f"{path} cannot be made ({error.strerror}); give another folder with output=FOLDER") from error
    return new


def remove_empty(made: list[Path]) -> None:
    """Removes folders that were made, outermost first in the list, but for those that another run uses meanwhile."""
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()


def replace_folder(target: Path, partial: Path) -> None:
    """Puts the new folder in the place of the old one, which is removed last."""
    partial.chmod(0o777 & ~_umask())
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / "run")
    partial.rename(target)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON with infinities and NaN as strings, so that every reader accepts it."""
    path.write_text(to_json(data), encoding="utf-8")


def to_json(data: Mapping[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps(_plain(data), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
