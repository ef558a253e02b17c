"""What the processor is."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_field(name: str) -> str | None:
    """What Linux says of the first processor under this name; None where it says nothing."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == name:
                return value.strip()
    except OSError:
        pass
    return None


def cpu_model() -> str:
    """Name of the processor."""
    return cpu_field("model name") or platform.processor() or platform.machine()
