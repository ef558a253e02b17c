"""The peak of this process's resident memory."""

from __future__ import annotations

import resource
from pathlib import Path


def reset_peak() -> bool:
    """Lowers the recorded peak of resident memory to what is resident now; tells whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Peak of resident memory since the last reset, or since this program began.

    Only Linux tells it; elsewhere the peak is that of `resource`, which a new process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
