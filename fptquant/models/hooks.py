"""Hooks that last as long as a block of code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks that were just registered when the block ends, however it ends."""
    registered: list[RemovableHandle] = []
    try:
        registered.extend(handles)  # which keeps those before an error in the middle
        yield
    finally:
        for handle in registered:
            handle.remove()
