"""What the stages before training have found, kept in a file: a run that goes on does not find it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fptquant.files import check_same_run, of_kind, read_file, replace_file, to_bytes

PREPARED = "checkpoint-prepared.safetensors"


@dataclass(frozen=True)
class Prepared:
    """The result of all stages before training."""

    transforms: dict[str, Tensor]
    """State of `fptquant.transforms.ModelTransforms`."""
    ranges: dict[str, Tensor]
    """As `fptquant.models.saving.range_tensors`."""
    prefix: list[int] | None
    """Token ids of the prefix."""
    report: dict[str, Any]
    """What the stages report."""
    seconds: dict[str, float]
    """How long each stage took."""


def save_prepared(path: Path, prepared: Prepared, belongs_to: Mapping[str, Any]) -> None:
    """Writes the file beside ``path`` and renames it.

    Args:
        belongs_to: what decides the result, as plain values.
    """
    kinds = {"transforms": prepared.transforms, "ranges": prepared.ranges}
    tensors = {f"{kind}/{name}": value.detach().cpu().clone() for kind, named in kinds.items() for name, value in named.items()}
    rest = {
        "prefix": prepared.prefix,
        "report": prepared.report,
        "seconds": prepared.seconds,
        "belongs_to": dict(belongs_to),
    }
    replace_file(path, to_bytes(tensors, rest))


def load_prepared(path: Path, belongs_to: Mapping[str, Any]) -> Prepared | None:
    """Reads the file, if there is one.

    Raises:
        UserError: if it is damaged or belongs to another run.
    """
    if not path.is_file():
        return None
    tensors, rest = read_file(path)
    check_same_run(path, rest["belongs_to"], belongs_to)
    return Prepared(of_kind("transforms", tensors), of_kind("ranges", tensors), rest["prefix"], rest["report"], rest["seconds"])
