"""Tables of zero-shot tasks: accuracy by task for several models, and every metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fptquant.evaluation.zero_shot import TaskScore, ZeroShot
from fptquant.reports.table import Row, markdown_line, rich_table

if TYPE_CHECKING:
    from rich.table import Table


def format_metric(score: TaskScore, metric: str) -> str:
    """Accuracies in per cent, other metrics as they are, with their standard error; no space at which a terminal breaks lines.

    >>> score = TaskScore("piqa", "1.0", {"acc": 0.625, "perplexity": 16.318}, {"acc": 0.0775}, 40, 0)
    >>> format_metric(score, "acc"), format_metric(score, "perplexity")
    ('62.5±7.8', '16.32')
    """
    factor, digits = (100, 1) if metric.startswith("acc") else (1, 2)
    error = score.stderr.get(metric)
    return f"{factor * score.metrics[metric]:.{digits}f}" + ("" if error is None else f"±{factor * error:.{digits}f}")


def _scored(rows: Sequence[Row]) -> list[tuple[Row, ZeroShot]]:
    return [(row, row.zero_shot) for row in rows if row.zero_shot is not None]


def task_lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A table by task of the rows that were scored; nothing if none was.

    The head, and of each row the model where there are several, method, setting, the main metric of each task, and the mean."""
    found = _scored(rows)
    if not found:
        return
    several = any(row.model is not None for row, _ in found)
    first = found[0][1].scores
    names = [name if score.main == "acc" else f"{name} {score.main}" for name, score in first.items()]
    yield [*(["model"] if several else []), "method", "setting", *names, "mean"]
    for row, zero_shot in found:
        main = [format_metric(score, score.main) for score in zero_shot.scores.values()]
        mean = zero_shot.mean_accuracy
        who = [*([row.model or "-"] if several else []), row.method, row.setting]
        yield [*who, *main, "-" if mean is None else f"{100 * mean:.1f}"]


def metric_lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A table of every metric of every task, a column for each of the rows that were scored; its head first."""
    found = _scored(rows)
    yield ["task", "metric", *(" ".join(filter(None, (row.model, row.method, row.setting))) for row, _ in found)]
    for name, score in found[0][1].scores.items() if found else ():
        for metric in score.metrics:
            yield [name, metric, *(format_metric(zero_shot.scores[name], metric) for _, zero_shot in found)]


def zero_shot_caption(rows: Sequence[Row]) -> str:
    """What was scored, and how to read it."""
    found = [zero_shot for _, zero_shot in _scored(rows)]
    counts = ", ".join(f"{score.task} {score.version}: {score.examples:,}" for score in found[0].scores.values())
    cut = sum(score.cut for zero_shot in found for score in zero_shot.scores.values())
    lost = f" {cut:,} texts were longer than the model's context and lost their beginning." if cut else ""
    return (
        f"Zero-shot accuracy in per cent ± standard error, by lm-eval; version of each task and number of examples: {counts}; "
        f"mean: of the accuracies.{lost}"
    )


def zero_shot_rich_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(title="zero-shot tasks", caption=zero_shot_caption(rows), caption_justify="left", title_justify="left")
    head, *body = task_lines(rows)
    for column in head:
        table.add_column(column, justify="left" if column in ("model", "method", "setting") else "right", overflow="fold")
    for line in body:
        table.add_row(*line)
    return table


def rich_tables(rows: Sequence[Row], *, title: str, width: int) -> list[Table]:
    """What was measured, for a terminal of so many characters a line: the table and, where tasks were scored, theirs."""
    tasks = [zero_shot_rich_table(rows)] if _scored(rows) else []
    return [rich_table(rows, title=title, width=width), *tasks]


def zero_shot_markdown(rows: Sequence[Row], *, title: str) -> str:
    """The table as Markdown, and a second one with every metric of every task."""
    head, *body = task_lines(rows)
    texts = 3 if "model" in head else 2
    lines = [f"# {title}", "", markdown_line(head), "|" + "---|" * texts + "---:|" * (len(head) - texts)]
    lines += [markdown_line(line) for line in body]
    head, *body = metric_lines(rows)
    lines += ["", zero_shot_caption(rows), "", "## Every metric", ""]
    lines += [markdown_line(head), "|---|---|" + "---:|" * (len(head) - 2), *(markdown_line(line) for line in body)]
    return "\n".join([*lines, ""])
