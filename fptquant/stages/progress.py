"""How long stages tell what they have done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""``progress(done, total, description)``: called after each unit of work, never printed by a stage itself."""


def quiet(done: int, total: int, description: str) -> None:
    """Ignores the progress of a stage."""
