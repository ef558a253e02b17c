"""Where commands print to."""

from __future__ import annotations

import os
from typing import Final

from rich.console import Console

WIDEST: Final = 180
"""Characters a line at which a table of results shows every column."""


def output_console() -> Console:
    """Standard output, as wide as the terminal or COLUMNS says; in a file, of which neither speaks, as wide as a table wants."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDEST
    return console
