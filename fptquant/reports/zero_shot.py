"""Tables of zero-shot tasks: accuracy by task for several models, and every metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fptquant.evaluation.zero_shot import TaskScore

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ZeroShotRow:
    """One line of the table: a method in a setting, and what it scored by task."""

    method: str
    setting: str
    scores: Mapping[str, TaskScore]

    @property
    def mean_accuracy(self) -> float | None:
        """Over the tasks that have an accuracy, each counting the same; None where there is none."""
        accuracies = [score.metrics["acc"] for score in self.scores.values() if "acc" in score.metrics]
        return sum(accuracies) / len(accuracies) if accuracies else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"mean_accuracy": self.mean_accuracy, "tasks": {name: score.as_dict() for name, score in self.scores.items()}}

    def cells(self) -> tuple[str, ...]:
        """Method, setting, the main metric of each task, and the mean."""
        mean = self.mean_accuracy
        main = [format_metric(score, score.main) for score in self.scores.values()]
        return self.method, self.setting, *main, "-" if mean is None else f"{100 * mean:.1f}"


def format_metric(score: TaskScore, metric: str) -> str:
    """Accuracies in per cent, other metrics as they are, with their standard error; no space at which a terminal breaks lines.

    >>> score = TaskScore("piqa", "1.0", {"acc": 0.625, "perplexity": 16.318}, {"acc": 0.0775}, 40, 0)
    >>> format_metric(score, "acc"), format_metric(score, "perplexity")
    ('62.5±7.8', '16.32')
    """
    factor, digits = (100, 1) if metric.startswith("acc") else (1, 2)
    error = score.stderr.get(metric)
    return f"{factor * score.metrics[metric]:.{digits}f}" + ("" if error is None else f"±{factor * error:.{digits}f}")


def _columns(rows: Sequence[ZeroShotRow]) -> list[str]:
    names = [name if score.main == "acc" else f"{name} {score.main}" for name, score in rows[0].scores.items()]
    return ["method", "setting", *names, "mean"]


def zero_shot_caption(rows: Sequence[ZeroShotRow]) -> str:
    """What was scored, and how to read it."""
    scores = rows[0].scores.values()
    counts = ", ".join(f"{score.task} {score.version}: {score.examples:,}" for score in scores)
    cut = sum(score.cut for row in rows for score in row.scores.values())
    lost = f" {cut:,} texts were longer than the model's context and lost their beginning." if cut else ""
    return (
        f"Zero-shot accuracy in per cent ± standard error, by lm-eval; version of each task and number of examples: {counts}; "
        f"mean: of the accuracies.{lost}"
    )


def zero_shot_rich_table(rows: Sequence[ZeroShotRow]) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(title="zero-shot tasks", caption=zero_shot_caption(rows), caption_justify="left", title_justify="left")
    for column in _columns(rows):
        table.add_column(column, justify="left" if column in ("method", "setting") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.cells())
    return table


def zero_shot_markdown(rows: Sequence[ZeroShotRow], *, title: str) -> str:
    """The table as Markdown, and a second one with every metric of every task."""
    columns = _columns(rows)
    lines = [f"# {title}", "", _line(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    lines += [_line(row.cells()) for row in rows]
    lines += ["", zero_shot_caption(rows), "", "## Every metric", ""]
    lines += [_line(["task", "metric", *(f"{row.method} {row.setting}" for row in rows)]), "|---|---|" + "---:|" * len(rows)]
    lines += [
        _line([name, metric, *(format_metric(row.scores[name], metric) for row in rows)])
        for name, score in rows[0].scores.items()
        for metric in score.metrics
    ]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
