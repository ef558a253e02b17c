"""How much memory this process holds, from Linux's account of it.

``resource.getrusage`` is no measure: its peak never falls, and a new process begins with the peak of the one that started it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

STATUS = Path("/proc/self/status")
NO_RESERVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Environment in which glibc gives every large block back once it is free; by default it may keep a hundred megabytes."""
measurable = pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")


def memory(key: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes resident now (VmRSS), or at the most since this program began (VmHWM)."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(key))
