"""Which folder a name means: of a plain model, or of a calibrated one. Nothing heavy is imported: mistakes are found at once."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from fptquant.errors import UserError

SMOLLM2_NAME = "smollm2-135m"
"""The name by which `fptquant.load_model` knows SmolLM2-135M-Instruct."""
MERGED, TRANSFORMED = "merged", "transformed"
"""Folders with the weights of a calibrated model: a plain checkpoint, or one that needs what acts online."""


def find_model(name: str) -> Path | None:
    """The folder that the name of a model means; None for `SMOLLM2_NAME` and for a name on the hub.

    Raises:
        UserError: if it looks like a folder that does not exist, or is a file, or nearly `SMOLLM2_NAME`.
    """
    path = Path(name).expanduser()
    if name == SMOLLM2_NAME:
        return None
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; name the folder that holds config.json and model.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {name} does not exist; name a folder, a hub name, or {SMOLLM2_NAME}")
    if get_close_matches(name, [SMOLLM2_NAME]):
        raise UserError(f"there is no model {name}; did you mean {SMOLLM2_NAME}?")
    return None


def check_saved(folder: Path) -> bool:
    """Whether a folder looks like a calibrated model."""
    return (folder / "config.yaml").is_file() and any((folder / name).is_dir() for name in (MERGED, TRANSFORMED))


def find_saved(path: str | Path) -> Path:
    """The folder of a calibrated model: this one, or the ``model`` of a run folder.

    Raises:
        UserError: if neither holds one.
    """
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if check_saved(candidate):
            return candidate
    if not folder.is_dir():
        raise UserError(f"there is no folder {path}; give a run folder of `fptquant run`, or a folder that save() wrote")
    if (folder / "cells").is_dir():
        raise UserError(f"{path} is a table; give one of its cells, {path}/cells/MODEL/CELL, if it was made with --save")
    raise UserError(
        f"{path} holds no calibrated model; give a run folder of `fptquant run` (without --no-save), or a folder that save() wrote"
    )
