"""Continuations of the same prompts by several models, beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fptquant.evaluation.samples import Continuation

if TYPE_CHECKING:
    from rich.table import Table

CAPTION = "Greedy decoding. same: the first tokens that agree with the full-precision model's."


@dataclass(frozen=True)
class Samples:
    """What each model said after each prompt; the first model is the full-precision one."""

    prompts: Sequence[str]
    continuations: Sequence[tuple[str, Sequence[Continuation]]]
    """Name of each model, and its continuations in the order of the prompts."""

    def lines(self, number: int) -> list[tuple[str, str, str]]:
        """Model, tokens that agree with the first model's, and continuation, for one prompt."""
        first = self.continuations[0][1][number]
        return [
            (name, f"{said[number].agreement(first)} of {len(first.tokens)}", visible(said[number].text))
            for name, said in self.continuations
        ]


def visible(text: str) -> str:
    r"""Text in one line; line breaks and the like are written as in Python.

    >>> visible('a\nb "c"')
    'a\\nb "c"'
    """
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')


def samples_rich_tables(samples: Samples) -> list[Table]:
    """A table for each prompt, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for number, prompt in enumerate(samples.prompts):
        table = Table(title=Text(f"sample {number + 1}: {visible(prompt)}"), title_justify="left", show_lines=True)
        for column in ("model", "same", "continuation"):
            table.add_column(column, overflow="fold")
        for line in samples.lines(number):
            table.add_row(*map(Text, line))  # texts as they are: brackets are no markup
        tables.append(table)
    tables[-1].caption, tables[-1].caption_justify = CAPTION, "left"
    return tables


def samples_markdown(samples: Samples, *, title: str) -> str:
    """The tables as Markdown."""
    lines = [f"# {title}", "", CAPTION]
    for number, prompt in enumerate(samples.prompts):
        lines += ["", f"## {number + 1}", "", f"> {_escaped(visible(prompt))}", ""]
        lines += ["| model | same | continuation |", "|---|---:|---|"]
        lines += [f"| {name} | {same} | {_escaped(text)} |" for name, same, text in samples.lines(number)]
    return "\n".join([*lines, ""])


def _escaped(line: str) -> str:
    """A line that Markdown shows as it is."""
    for sign in "\\`*_<>|#[]":
        line = line.replace(sign, f"\\{sign}")
    return line
