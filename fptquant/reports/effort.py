"""What a run takes: time, processor time and memory, over all processes that work on it, killed ones included."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fptquant.files import KeptFiles, replace_file
from fptquant.memory import peak_bytes, reset_peak, return_memory
from fptquant.reports.unfinished_run import CHECKPOINT
from fptquant.stages.distributed import gathered, on_main, rank, world_size
from fptquant.stages.progress import Progress, say, tell

_FILE = f"{CHECKPOINT}_effort"
"""Belongs to the unfinished run, and alone does not make it worth keeping."""


@dataclass(frozen=True)
class Effort:
    """What one process has taken, or several."""

    seconds: float = 0.0
    """By the clock."""
    cpu_seconds: float = 0.0
    """Of the processor, all threads together."""
    peak_bytes: int = 0
    """Most resident memory of one process."""
    cuda_peak_bytes: int | None = None
    """Most memory of tensors on one CUDA device."""

    def after(self, earlier: Effort) -> Effort:
        """Of processes that worked one after the other."""
        return self._with(earlier, self.seconds + earlier.seconds)

    def beside(self, other: Effort) -> Effort:
        """Of processes that worked at the same time."""
        return self._with(other, max(self.seconds, other.seconds))

    def _with(self, other: Effort, seconds: float) -> Effort:
        cuda = [peak for peak in (self.cuda_peak_bytes, other.cuda_peak_bytes) if peak is not None]
        peak = max(self.peak_bytes, other.peak_bytes)
        return Effort(seconds, self.cpu_seconds + other.cpu_seconds, peak, max(cuda, default=None))


class EffortMeter:
    """Measures what a block takes, on top of what was written in the same unfinished run before.

    The account is written whenever a second has passed, and when the block ends in whatever way: a process that is killed loses
    that second. Each of several processes has a file of its own. Memory that earlier work of this process has left does not count.
    """

    def __init__(self, folder: Path, device: torch.device, *, keep_seconds: float = 1.0) -> None:
        self._folder, self._device = folder, device
        self._kept = KeptFiles(folder, keep_seconds).file(_name(rank()))
        self._earlier = _read(self._kept.path)
        self._peaks: tuple[int, int | None] | None = None
        return_memory()
        reset_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._started = time.perf_counter(), time.process_time()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._spent = self._now()
        with suppress(OSError):  # no run is given up for want of its account
            replace_file(self._kept.path, _content(self._spent))

    def watch(self, progress: Progress) -> Progress:
        """The same progress; whenever it is called, the account is written if it is time."""
        return _Watched(self, progress)

    def keep(self) -> None:
        """Writes the account if it is time."""
        with suppress(OSError):
            self._kept.write(lambda: _content(self._now()))

    def end_memory(self) -> None:
        """What follows in the block counts as time, and not as memory."""
        self._peaks = self._memory()

    def total(self) -> Effort:
        """Of all processes of the run, after the block; the same in each of those that work together."""
        present = {_name(number) for number in range(world_size())}
        # a run that goes on may have fewer processes than before
        gone: list[Effort] = on_main(
            lambda: [_read(file) for file in self._folder.glob(f"{_FILE}_*.json") if file.name not in present]
        )
        return reduce(Effort.beside, [*gathered(self._spent), *gone])

    def _now(self) -> Effort:
        clock, processor = self._started
        spent = time.perf_counter() - clock, time.process_time() - processor
        return Effort(*spent, *(self._peaks or self._memory())).after(self._earlier)

    def _memory(self) -> tuple[int, int | None]:
        return peak_bytes(), int(torch.cuda.max_memory_allocated(self._device)) if self._device.type == "cuda" else None


class _Watched:
    """A progress that keeps an account, too."""

    def __init__(self, meter: EffortMeter, progress: Progress) -> None:
        self._meter, self._progress = meter, progress

    def __call__(self, done: int, total: int, description: str, note: str = "") -> None:
        self._meter.keep()
        tell(self._progress, done, total, description, note)

    def say(self, line: str) -> None:
        say(self._progress, line)


def _name(number: int) -> str:
    return f"{_FILE}_{number}.json"


def _content(effort: Effort) -> bytes:
    return json.dumps(asdict(effort)).encode()


def _read(file: Path) -> Effort:
    """What a file says; nothing if there is none that can be read."""
    try:
        return Effort(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Effort()
