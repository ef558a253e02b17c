"""Files of unfinished work: safetensors with plain values in the metadata, written whole or not at all, and what they belong to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from fptquant.config.differences import differences
from fptquant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
WORTH_KEEPING = 60.0
"""Seconds of work that must not be lost."""


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file beside ``path``, makes sure that it is on the disk, and renames it."""
    beside = path.with_name(path.name + ".new")
    write_through(beside, content)
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def write_through(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class KeptFiles:
    """Files of finished work in one folder, which are written together when a minute has passed since the last time.

    A run that is killed loses that minute; one that takes no longer writes nothing.
    """

    def __init__(self, folder: Path, seconds: float = WORTH_KEEPING) -> None:
        self.folder, self.seconds = folder, seconds
        self._waiting: dict[Path, Callable[[], bytes]] = {}
        self._written = time.monotonic()

    def file(self, name: str) -> KeptFile:
        """One of the files, which need not exist."""
        return KeptFile(self, self.folder / name)

    def write(self, path: Path, content: Callable[[], bytes]) -> None:
        """Writes the file when it is time; what it was to hold before is forgotten."""
        self._waiting[path] = content
        if time.monotonic() - self._written >= self.seconds:
            self.folder.mkdir(parents=True, exist_ok=True)
            for waiting, current in self._waiting.items():
                replace_file(waiting, current())
            self._waiting, self._written = {}, time.monotonic()


@dataclass(frozen=True)
class KeptFile:
    """One file of `KeptFiles`."""

    files: KeptFiles
    path: Path

    def write(self, content: Callable[[], bytes]) -> None:
        """As `KeptFiles.write`."""
        self.files.write(self.path, content)


def to_bytes(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> bytes:
    """A safetensors file with plain values in its metadata."""
    from safetensors.torch import save  # imports torch, which takes seconds

    return save(dict(tensors), metadata={"fptquant": json.dumps({"format": FORMAT, **rest})})


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `to_bytes` was given.

    Raises:
        UserError: if the file is damaged or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            rest: dict[str, Any] = json.loads((file.metadata() or {})["fptquant"])
            # Copies, because the library's tensors are views of the file, aligned as it happens.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); start the run anew with --overwrite") from error
    if rest["format"] != FORMAT:
        raise UserError(f"{path} is of another version of fptquant; go on with that one, or start the run anew with --overwrite")
    return tensors, rest


def check_same_run(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compares what a file was written for with what it is read for.

    Raises:
        UserError: names what differs.
    """
    other = differences(saved, current)
    if other:
        raise UserError(
            f"the checkpoint {path} belongs to another run ({'; '.join(other)}); set these as they were, "
            "or start anew with --overwrite"
        )


def of_kind(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are called ``kind/name``, by name."""
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}
