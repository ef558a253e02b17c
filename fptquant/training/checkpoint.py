"""Checkpoints of training: one file, written beside and renamed, from which a run goes on as if it had never stopped.

checkpoint.safetensors holds tensors by ``kind/name``::

    parameters/NAME          everything that training changes
    optimizer/NAME/MOMENT    AdamW's moments and step counts
    gradients/NAME           what the step under way has collected so far, if one is under way
    best/NAME                the state with the lowest held-out divergence
    random/torch, random/cuda/N   states of the generators

and in the metadata, as JSON, the rest: numbers of the run, the other generators, what the run belongs to. Reading it runs no
code, unlike a pickle; moments in other dtypes than float32 keep theirs.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fptquant.files import of_kind, read_file, replace_file, to_bytes

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Position:
    """Where a run is, and what it has seen: the numbers of a checkpoint."""

    step: int = 0
    """Finished steps."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each micro batch of the step under way."""
    step_seconds: float = 0.0
    """Work on the step under way."""
    smoothed: float | None = None
    """Loss, smoothed over about ten steps."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(finished steps, held-out divergence)"""
    first_loss: float | None = None
    last_loss: float | None = None
    seconds: float = 0.0
    """Work so far, over all parts of the run."""
    notices: list[str] = field(default_factory=list)
    log_bytes: int = 0
    """Length of metrics.jsonl."""


@dataclass(frozen=True)
class Checkpoint:
    """A run at one moment, between two micro batches."""

    position: Position
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    gradients: dict[str, Tensor]
    best: dict[str, Tensor]
    randomness: Randomness
    belongs_to: dict[str, Any]
    """What must be the same when the run goes on."""
    machine: dict[str, Any]
    """What decides the last bits."""


@dataclass(frozen=True)
class Randomness:
    """States of all random number generators."""

    tensors: dict[str, Tensor]
    python: list[Any]
    numpy: list[Any]

    @classmethod
    def capture(cls) -> Randomness:
        """The states now."""
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            tensors |= {f"cuda/{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
        version, internal, gauss = random.getstate()
        name, keys, *rest = np.random.get_state(legacy=True)
        return cls(tensors, [version, list(internal), gauss], [name, np.asarray(keys).tolist(), *rest])

    @staticmethod
    def seed(seed: int) -> None:
        """Starts all generators from one number."""
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def restore(self) -> None:
        """Puts them back; those of devices that are not here are left out."""
        torch.set_rng_state(self.tensors["torch"])
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                if f"cuda/{index}" in self.tensors:
                    torch.cuda.set_rng_state(self.tensors[f"cuda/{index}"], index)
        version, internal, gauss = self.python
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = self.numpy
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint; one that was there before is replaced at once."""
    kinds = {
        "parameters": checkpoint.parameters,
        "optimizer": checkpoint.optimizer,
        "gradients": checkpoint.gradients,
        "best": checkpoint.best,
        "random": checkpoint.randomness.tensors,
    }
    # Clones, because the file format refuses tensors that share memory, as a parameter and the best state may.
    tensors = {f"{kind}/{name}": _plain(tensor) for kind, named in kinds.items() for name, tensor in named.items()}
    rest = {
        "position": asdict(checkpoint.position),
        "python": checkpoint.randomness.python,
        "numpy": checkpoint.randomness.numpy,
        "belongs_to": checkpoint.belongs_to,
        "machine": checkpoint.machine,
    }
    replace_file(path, to_bytes(tensors, rest))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint. Errors as in `read_file`."""
    tensors, rest = read_file(path)
    position = Position(**rest["position"])
    position.curve = [(int(step), float(divergence)) for step, divergence in position.curve]
    return Checkpoint(
        position,
        of_kind("parameters", tensors),
        of_kind("optimizer", tensors),
        of_kind("gradients", tensors),
        of_kind("best", tensors),
        Randomness(of_kind("random", tensors), rest["python"], rest["numpy"]),
        rest["belongs_to"],
        rest["machine"],
    )
