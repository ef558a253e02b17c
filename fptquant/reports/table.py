"""Tables of results, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

    from fptquant.evaluation.evaluate import Evaluation

COLUMNS = ("method", "setting", "perplexity", "JSD", "top-1", "seconds")


@dataclass(frozen=True)
class Row:
    """One line of a table: a method in a setting, and what was measured."""

    method: str
    setting: str
    evaluation: Evaluation
    seconds: float
    """Calibration and evaluation together."""

    def cells(self) -> tuple[str, ...]:
        """What each of ``COLUMNS`` shows."""
        return (
            self.method,
            self.setting,
            format_perplexity(self.evaluation.perplexity),
            "-" if self.evaluation.jsd is None else f"{self.evaluation.jsd:.4f}",
            "-" if self.evaluation.top1_agreement is None else f"{100 * self.evaluation.top1_agreement:.1f} %",
            f"{self.seconds:.1f}",
        )


def format_perplexity(value: float) -> str:
    """Two decimals where they mean something, powers of ten where they do not.

    >>> format_perplexity(29.2034), format_perplexity(1234.5), format_perplexity(2.34e7), format_perplexity(math.inf)
    ('29.20', '1,234', '2.3e+07', 'infinite')
    """
    if math.isinf(value):
        return "infinite"
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"


def caption(rows: Sequence[Row]) -> str:
    """What the numbers were measured on and how to read them."""
    texts = sorted({row.evaluation.text_name for row in rows})
    tokens = sorted({row.evaluation.tokens for row in rows})
    return (
        f"Text: {', '.join(texts)}, {' or '.join(f'{count:,}' for count in tokens)} predictions. "
        "JSD: mean Jensen-Shannon divergence from the full-precision model in nats; top-1: how often both find the same "
        "token likeliest; seconds: calibration and evaluation."
    )


def rich_table(rows: Sequence[Row], *, title: str) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(title=title, caption=caption(rows), caption_justify="left", title_justify="left")
    for column in COLUMNS:
        justify: Literal["left", "right"] = "left" if column in ("method", "setting") else "right"
        table.add_column(column, justify=justify, no_wrap=column != "setting")  # a long setting takes several lines
    previous = None
    for row in rows:
        if previous is not None and row.setting != previous:
            table.add_section()
        previous = row.setting
        table.add_row(*row.cells())
    return table


def markdown_table(rows: Sequence[Row], *, title: str) -> str:
    """The table as Markdown, with its title and caption."""
    head = "| " + " | ".join(COLUMNS) + " |"
    rule = "|---|---|---:|---:|---:|---:|"
    body = ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join([f"# {title}", "", head, rule, *body, "", caption(rows), ""])
