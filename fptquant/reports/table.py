"""Tables of results: rows, what they show, and the forms in which they are written."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fptquant.config.tables import FULL_PRECISION
from fptquant.evaluation.cost import RuntimeCost
from fptquant.evaluation.evaluate import Evaluation
from fptquant.evaluation.zero_shot import ZeroShot
from fptquant.reports.console import WIDEST

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of a table: a method in a setting, and what was measured."""

    method: str
    setting: str
    evaluation: Evaluation | None
    """None where the run failed, or a paper alone has measured."""
    seconds: float | None
    """Calibration and evaluation together, by the clock, in all processes that worked on the run one after the other."""
    cost: RuntimeCost | None = None
    cpu_seconds: float | None = None
    """The same, of the processor, all threads and processes together."""
    peak_bytes: int | None = None
    """Most resident memory of a process while it calibrated, the full-precision model and all libraries included."""
    cuda_peak_bytes: int | None = None
    """Most memory of tensors on a CUDA device meanwhile; None without one."""
    model: str | None = None
    published: float | None = None
    """The perplexity that a paper prints for this row."""
    source: str | None = None
    """Which paper."""
    config: str | None = None
    """Where the resolved config lies, seen from the table's file."""
    error: str | None = None
    """Why there is no evaluation."""
    zero_shot: ZeroShot | None = None
    """What it scored on zero-shot tasks, where these were asked for."""

    @property
    def label(self) -> str:
        """The setting without its notes."""
        return self.setting.partition(",")[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for metrics.json."""
        return {
            "method": self.method,
            "setting": self.setting,
            "total_seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "evaluation": None if self.evaluation is None else self.evaluation.as_dict(),
            "cost": None if self.cost is None else self.cost.as_dict(),
            "peak_bytes": self.peak_bytes,
            "cuda_peak_bytes": self.cuda_peak_bytes,
            **{
                key: value
                for key in ("model", "published", "source", "config", "error")
                if (value := getattr(self, key)) is not None
            },
            **({} if self.zero_shot is None else {"zero_shot": self.zero_shot.as_dict()}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The row that `as_dict` came from; numbers that JSON has as texts (infinity) are numbers again.

        What an earlier version has not measured is None.
        """
        evaluation = Evaluation(**{**data["evaluation"], "perplexity": float(data["evaluation"]["perplexity"])})
        found = data.get("cost")
        cost = None if found is None else RuntimeCost(*(found[key] for key in ("added", "linears", "scales")))
        zero_shot = ZeroShot.from_dict(data["zero_shot"]) if "zero_shot" in data else None
        measured = {key: data.get(key) for key in ("cpu_seconds", "peak_bytes", "cuda_peak_bytes")}
        return cls(data["method"], data["setting"], evaluation, data["total_seconds"], cost=cost, zero_shot=zero_shot, **measured)

    @property
    def difference(self) -> float | None:
        """How far the measured perplexity is from the published one."""
        return None if self.published is None or self.evaluation is None else self.evaluation.perplexity - self.published

    @property
    def mean_accuracy(self) -> float | None:
        """Of the zero-shot tasks."""
        return None if self.zero_shot is None else self.zero_shot.mean_accuracy


@dataclass(frozen=True)
class _Column:
    """What one column shows of a row; one that is not ``always`` there appears where some row has something to show."""

    title: str
    text: Callable[[Row], str]
    right: bool = True
    always: bool = False
    dispensable: int = 0
    """The higher, the sooner a narrow terminal leaves it out; 0: never. Files have it."""


def _of_evaluation(show: Callable[[Evaluation], str]) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        if row.evaluation is None:
            return "failed" if row.error is not None else "-"
        return show(row.evaluation)

    return text


def _optional(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _published(row: Row) -> str:
    return _optional(row.published, lambda value: format_perplexity(value) + _difference(row, " ({})"))


def _difference(row: Row, form: str) -> str:
    """From what is published, in the form of the table; nothing where the measured value is not shown with decimals."""
    return "" if row.difference is None or _perplexity(row) >= 1000 else form.format(f"{row.difference:+.2f}")


def _mebibytes(size: int | None) -> str:
    return _optional(size, lambda value: f"{value / 2**20:,.0f}")


_ALL_COLUMNS = (
    _Column("model", lambda row: row.model or "-", right=False),
    _Column("method", lambda row: row.method, right=False, always=True),
    _Column("setting", lambda row: row.setting, right=False, always=True),
    _Column("perplexity", _of_evaluation(lambda found: format_perplexity(found.perplexity)), always=True),
    _Column("published", _published),
    _Column("JSD", _of_evaluation(lambda found: _optional(found.jsd, "{:.4f}".format)), always=True),
    _Column("KL", lambda row: _optional(row.evaluation.kl if row.evaluation else None, "{:.4f}".format), dispensable=4),
    _Column("top-1", _of_evaluation(lambda found: _optional(found.top1_agreement, _percent)), always=True),
    _Column("zero-shot", lambda row: _optional(row.mean_accuracy, _percent)),
    _Column(
        "added MACs", lambda row: "-" if row.cost is None or not row.cost.added else f"{100 * row.cost.share:.2f} %", dispensable=2
    ),
    _Column("scales", lambda row: "-" if row.cost is None else row.cost.scales.replace("none", "-"), dispensable=1),
    _Column("seconds", lambda row: _optional(row.seconds, "{:.1f}".format), always=True),
    _Column("CPU seconds", lambda row: _optional(row.cpu_seconds, "{:.1f}".format), dispensable=5),
    _Column("peak MiB", lambda row: _mebibytes(row.peak_bytes), dispensable=3),
    _Column("CUDA MiB", lambda row: _mebibytes(row.cuda_peak_bytes), dispensable=6),
)
_MEANINGS = {
    "JSD": "mean Jensen-Shannon divergence from the full-precision model in nats",
    "KL": "mean Kullback-Leibler divergence from the full-precision model in nats",
    "top-1": "how often both find the same token likeliest",
    "zero-shot": "mean accuracy of the tasks",
    "published": "a value from elsewhere, source below, and how far the measured one is from it",
    "added MACs": "additions and multiplications that full precision does not do, in proportion to those of all linears",
    "scales": "whether ranges of activations and cache are set beforehand or found for every token",
    "seconds": "calibration and evaluation, parts that were killed included",
    "CPU seconds": "the same without waiting, all threads together",
    "peak MiB": "resident memory of the process while it calibrated, the full-precision model and all libraries included",
    "CUDA MiB": "memory of tensors on the device meanwhile",
}


def _columns(rows: Sequence[Row]) -> list[_Column]:
    return [column for column in _ALL_COLUMNS if column.always or any(column.text(row) != "-" for row in rows)]


def column_titles(rows: Sequence[Row]) -> list[str]:
    """The heads of the columns that a table of these rows has."""
    return [column.title for column in _columns(rows)]


def texts(rows: Sequence[Row]) -> list[list[str]]:
    """What the columns of a table show of each row."""
    columns = _columns(rows)
    return [[column.text(row) for column in columns] for row in rows]


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


def caption(rows: Sequence[Row], shown: Sequence[str] | None = None) -> str:
    """What the numbers were measured on and how to read them.

    Args:
        shown: titles of the columns that are explained; by default of all that these rows have.
    """
    found = [row.evaluation for row in rows if row.evaluation is not None]
    texts = sorted({evaluation.text_name for evaluation in found})
    tokens = sorted({evaluation.tokens for evaluation in found})
    measured = f"Text: {', '.join(texts)}, {' or '.join(f'{count:,}' for count in tokens)} predictions. " if found else ""
    shown = column_titles(rows) if shown is None else shown
    sources = sorted({row.source for row in rows if row.source is not None})
    papers = f" Published values: {'; '.join(sources)}." if sources else ""
    return measured + "; ".join(f"{title}: {meaning}" for title, meaning in _MEANINGS.items() if title in shown) + "." + papers


def rich_table(rows: Sequence[Row], *, title: str, width: int = WIDEST) -> Table:
    """The table for a terminal of so many characters a line; columns that do not fit are left out."""
    from rich.markup import escape
    from rich.table import Table

    columns = _columns(rows)
    while _least_width(columns, rows) > width and any(column.dispensable for column in columns):
        columns.remove(max(columns, key=lambda column: column.dispensable))
    legend = caption(rows, [column.title for column in columns])
    table = Table(title=title, caption=legend, caption_justify="left", title_justify="left")
    fits = _least_width(columns, rows) <= width
    for column in columns:
        # a long setting takes several lines, and its label stays in one piece where there is room
        least = _least_characters(column, rows) if fits else None
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=column.title != "setting",
            overflow="fold",
            min_width=least,
        )
    previous = None
    for row in rows:
        if previous is not None and (row.model, row.setting) != previous:
            table.add_section()
        previous = row.model, row.setting
        table.add_row(*(escape(column.text(row)) for column in columns))
    return table


def _least_characters(column: _Column, rows: Sequence[Row]) -> int:
    texts = [column.title, *map(column.text, rows)]
    return max(len(part) for text in texts for part in (text.split() if column.title == "setting" else [text]))


def _least_width(columns: Sequence[_Column], rows: Sequence[Row]) -> int:
    """Characters a line that a table takes at least, with its rules."""
    return sum(_least_characters(column, rows) + 3 for column in columns) + 1


def markdown_table(rows: Sequence[Row], *, title: str, state: str = "", picture: str | None = None) -> str:
    """The table as Markdown, with its title and caption; perplexity is a link to its config where the row says where that lies.

    Args:
        state: what is missing, if anything is.
        picture: the path of a plot of accuracy against cost, shown at the end.
    """
    columns = _columns(rows)
    rule = "|" + "|".join("---:" if column.right else "---" for column in columns) + "|"
    body = [markdown_line(_linked(row, column) for column in columns) for row in rows]
    failures = [f"- {row.method}, {row.setting}{f', {row.model}' if row.model else ''}: {row.error}" for row in rows if row.error]
    head = [f"# {title}", "", *([f"{state}.", ""] if state else [])]
    parts = [*head, markdown_line(column.title for column in columns), rule, *body, "", caption(rows), ""]
    picture_lines = [f"![Perplexity against run-time cost]({picture})", ""] if picture else []
    return "\n".join([*parts, *(["Failed:", "", *failures, ""] if failures else []), *picture_lines])


def markdown_line(cells: Iterable[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def _linked(row: Row, column: _Column) -> str:
    text = column.text(row).replace("|", "\\|")
    return f"[{text}]({row.config})" if row.config is not None and column.title == "perplexity" else text


_CSV_COLUMNS = (
    "model", "method", "setting", "perplexity", "published", "difference", "source", "jsd", "kl", "top1_agreement", "tokens",
    "text_name", "mean_accuracy", "added_macs", "added_share", "scales", "seconds", "cpu_seconds", "peak_bytes",
    "cuda_peak_bytes", "config", "error",
)  # fmt: skip


def csv_table(rows: Sequence[Row]) -> str:
    """The rows with every digit, for a spreadsheet or a script; empty where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        found = {} if row.evaluation is None else row.evaluation.as_dict()
        cost = row.cost
        extra = {} if cost is None else {"added_macs": sum(cost.added.values()), "added_share": cost.share, "scales": cost.scales}
        writer.writerow({**found, **vars(row), "difference": row.difference, "mean_accuracy": row.mean_accuracy, **extra})
    return text.getvalue()


def latex_table(rows: Sequence[Row], *, title: str, state: str = "") -> str:
    """A table for a paper (packages booktabs): methods down, models and settings across, perplexity in the cells.

    The best of a column is bold; a published value stands in parentheses, with how far the measured one is from
    it. Cells that failed say so; those not run are dashes.

    Args:
        state: what is missing, if anything is.
    """
    full = {row.model: row for row in rows if row.method == FULL_PRECISION}
    found = {(row.method, row.model, row.label): row for row in rows if row.method != FULL_PRECISION and row.label != "-"}
    across = list(dict.fromkeys((model, label) for _, model, label in found))
    down = list(dict.fromkeys(method for method, _, _ in found))
    best = {key: min(_perplexity(row) for row in found.values() if (row.model, row.label) == key) for key in across}

    def cell(method: str, key: tuple[str | None, str]) -> str:
        row = found.get((method, *key))
        return _latex_cell(row, best=row is not None and _perplexity(row) == best[key])

    heads = [_latex(f"{model} {setting}" if model else setting) for model, setting in across]
    first = [_latex_cell(full.get(model), best=False) for model, _ in across]
    lines = [
        rf"% {title}{f', {state}' if state else ''}",
        rf"\begin{{tabular}}{{l{'r' * len(across)}}}",
        r"\toprule",
        " & ".join(["method", *heads]) + r" \\",
        r"\midrule",
        " & ".join([FULL_PRECISION, *first]) + r" \\",
        *(" & ".join([_latex(method), *(cell(method, key) for key in across)]) + r" \\" for method in down),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, ""])


def _latex_cell(row: Row | None, *, best: bool) -> str:
    """What was measured or that it failed, what a paper prints in parentheses, or both, with the difference."""
    if row is None:
        return "--"
    shown = "failed" if row.error is not None else ""
    if row.evaluation is not None:
        measured = _latex(format_perplexity(row.evaluation.perplexity))
        shown = rf"\textbf{{{measured}}}" if best else measured
    published = "" if row.published is None else f"({_latex(format_perplexity(row.published))}{_difference(row, ', ${}$')})"
    return f"{shown} {published}".strip() or "--"


def _perplexity(row: Row) -> float:
    return math.inf if row.evaluation is None else row.evaluation.perplexity


_LATEX = str.maketrans(
    {**{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)
