"""What a streamed calibration has finished, and the time that each stage has taken."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fptquant.files import replace_file
from fptquant.memory import return_memory


@dataclass
class StreamState:
    """What is known of the parts that are finished; -1 is the embedding, the number of blocks the final norm and ``lm_head``."""

    next: int = -1
    seconds: dict[str, float] = field(default_factory=dict)
    local: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """`TermReport` of every block, as dictionaries."""

    @classmethod
    def load(cls, path: Path) -> StreamState:
        """The stored state, or that of the beginning."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()

    def save(self, path: Path) -> None:
        """Replaces the file at once: it tells of the part before, or of this one."""
        replace_file(path, json.dumps(asdict(self)).encode())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time that is spent inside to that of a stage."""
        start = time.perf_counter()
        yield
        return_memory()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
