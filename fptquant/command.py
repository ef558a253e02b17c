"""What commands share: their options, and how a mistake ends.

A mistake of the user ends with one message and exit code 2, an interruption with 130.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from fptquant.errors import CoreUnavailable, ProcessLost, UserError
from fptquant.reports.processes import speaks

_Arguments = ParamSpec("_Arguments")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
File = Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, or the name of a shipped method (fptquant ls).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's, such as quantization=w4a4kv4-static."),
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder for the results, in place of output=FOLDER.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the output folder holds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run of the output folder.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads; all cores by default.")]
Save = Annotated[bool, typer.Option("--save/--no-save", help="Write the calibrated model into the run folder.")]

Stream = Annotated[
    bool,
    typer.Option("--stream", help="Hold one block in memory at a time, and only calibrate: for models larger than memory."),
]


def guard(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turns a user's mistake into a message and exit code 2, the loss of another process into 1, and Ctrl-C into 130."""

    @functools.wraps(command)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        errors = Console(stderr=True, highlight=False, soft_wrap=True)
        try:
            command(*args, **kwargs)
        except (UserError, CoreUnavailable, ProcessLost) as error:
            if kwargs.get("debug"):
                errors.print_exception()
            if speaks():
                errors.print(f"[bold red]error:[/] {escape(str(error))}")
                _print_notes(errors, error)
            raise typer.Exit(1 if isinstance(error, ProcessLost) else 2) from None
        except KeyboardInterrupt as interruption:
            if speaks():
                errors.print("interrupted; nothing was left half-written")
                _print_notes(errors, interruption)
            raise typer.Exit(130) from None
        except SystemExit as end:  # a polite kill
            if speaks():
                _print_notes(errors, end)
            raise

    return guarded


def _print_notes(console: Console, error: BaseException) -> None:
    """What the error has been given on its way, such as how to go on."""
    for note in getattr(error, "__notes__", ()):
        console.print(escape(note))
