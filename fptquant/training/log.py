"""metrics.jsonl: one JSON object per step and per evaluation; the same for TensorBoard, if asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptquant.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


def check_tensorboard(key: str = "training") -> None:
    """Refuses TensorBoard where it is not installed; ``key``: where the setting stands in a config.

    Raises:
        UserError: says what to install.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"{key}.tensorboard needs a package: pip install 'fptquant[tensorboard]', or set {key}.tensorboard=false")


class MetricsLog:
    """Appends to metrics.jsonl in a folder; without a folder it forgets everything.

    Args:
        length: bytes that the file had at the checkpoint from which a run goes on; what came after is cut off.
        step: finished steps at that moment.
    """

    def __init__(self, folder: Path | None, *, length: int = 0, step: int = 0, tensorboard: bool = False) -> None:
        self._file = None
        self._events: SummaryWriter | None = None
        if folder is None:
            return
        path = folder / METRICS
        # Append mode after a cut: a file that is shorter than it should be (someone else's doing) is not padded with zeros.
        if path.exists() and path.stat().st_size > length:
            os.truncate(path, length)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._events = _events(folder / EVENTS, step)

    def step(self, step: int, **values: Any) -> None:
        """Notes a finished step."""
        self._write("step", step, values)

    def evaluation(self, step: int, **values: Any) -> None:
        """Notes a look at the held-out windows after so many steps."""
        self._write("evaluation", step, values)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                    self._events.add_scalar(f"{kind}/{name}{'/' + part if part else ''}", number, step)

    def sync(self) -> int:
        """Waits until the file is on the disk; returns its length in bytes."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _events(folder: Path, step: int) -> SummaryWriter:
    check_tensorboard()
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(folder, purge_step=step + 1)
