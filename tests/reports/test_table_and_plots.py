"""Tables, plots and progress: what they show."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from fptquant.evaluation.cost import RuntimeCost
from fptquant.evaluation.evaluate import Evaluation
from fptquant.reports.plots import (
    logarithmic,
    new_figure,
    plot_activations,
    plot_block_error_map,
    plot_block_errors,
    plot_outliers,
    shrink,
)
from fptquant.reports.progress import Labeled, Progress
from fptquant.reports.statistics import collect_activations
from fptquant.reports.table import Row, latex_table, markdown_table, rich_table
from fptquant.stages.progress import say, tell
from tests.models.tiny import tiny_model, token_ids

ROWS = [
    Row("full precision", "float32", Evaluation(29.2, 0.0, 1.0, 8184, 3.0, "WikiText-2 test"), 3.0),
    Row("rtn", "w4a4kv4-static", Evaluation(math.inf, 0.61, 0.123, 8184, 3.0, "WikiText-2 test"), 12.34),
]


def test_markdown() -> None:
    lines = markdown_table(ROWS, title="demo").splitlines()
    assert lines[0] == "# demo"
    assert lines[4] == "| full precision | float32 | 29.20 | 0.0000 | 100.0 % | 3.0 |"
    assert lines[5] == "| rtn | w4a4kv4-static | infinite | 0.6100 | 12.3 % | 12.3 |"
    assert "WikiText-2 test, 8,184 predictions" in lines[-1]


def test_columns_of_what_few_rows_have() -> None:
    measured = Row("gptq", "w4a16", ROWS[0].evaluation, 3.0, cpu_seconds=5.25, peak_bytes=2**30, cuda_peak_bytes=3 * 2**20)
    lines = markdown_table([ROWS[0], measured], title="demo").splitlines()
    assert lines[2].endswith("| seconds | CPU seconds | peak MiB | CUDA MiB |")
    assert lines[4].endswith("| 3.0 | - | - | - |")
    assert lines[5].endswith("| 3.0 | 5.2 | 1,024 | 3 |")
    assert Row.from_dict(measured.as_dict()) == measured


def test_terminal() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(rich_table(ROWS, title="demo"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "w4a4kv4-static" in shown
    assert "12.3 %" in shown


@pytest.mark.parametrize("width", [80, 100, 110, 120, 132, 180])
def test_a_terminal_has_as_many_columns_as_fit_and_explains_these_alone(width: int) -> None:
    cost = RuntimeCost({"T_d": 1}, 100, "static")
    assert ROWS[1].evaluation is not None
    evaluation = replace(ROWS[1].evaluation, kl=0.5)
    long = "w4a8kv8-static, activations and cache centered, prefix of 1 token"
    row = Row("fptquant-local-gptq", long, evaluation, 2180.9, cost=cost, cpu_seconds=99.5, peak_bytes=2**30)
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table([ROWS[0], row], title="demo", width=width))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    label = "w4a8kv8-static," if width > 80 else "w4a8kv8-stat"  # folded
    assert all(part in shown for part in ("fptquant-local-gptq", label, "0.6100", "12.3 %", "2180.9"))
    head = shown.splitlines()[2]
    legend = " ".join(shown.partition("Text:")[2].split())
    for title, needs in {"scales": 100, "added MACs": 110, "peak MiB": 120, "KL": 132, "CPU seconds": 180}.items():
        assert (title in head) == (f"{title}:" in legend)
        assert title in head or width < needs


def test_a_long_setting_does_not_hide_the_numbers() -> None:
    console = Console(file=io.StringIO(), width=70)
    long = Row("fptquant-local", "w4a4kv4-static, prefix of 1 token, without one kept", ROWS[1].evaluation, 2180.9)
    console.print(rich_table([ROWS[0], long], title="demo", width=70))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(part in shown for part in ("fptquant-local", "infinite", "0.6100", "12.3 %", "2180.9"))


def test_shrinking_keeps_every_outlier() -> None:
    values = np.zeros((100, 1000), dtype=np.float32)
    values[37, 613] = 5
    small = shrink(values, (8, 90))
    assert small.shape == (8, 90)
    assert small.max() == 5
    assert (small > 0).sum() == 1
    assert shrink(values, (1000, 5000)).shape == values.shape


def test_plots_are_written(tmp_path: Path) -> None:
    statistics = collect_activations(tiny_model("LlamaForCausalLM"), token_ids(1, 24)[0])
    plot_activations(statistics, statistics, tmp_path / "activations.png")
    plot_outliers(statistics, statistics, tmp_path / "outliers.png")
    plot_block_errors({"rtn": [0.1, 0.3], "exact": [0.0, 0.0]}, tmp_path / "errors.png")
    for name in ("activations", "outliers", "errors"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("perplexities", [(29.22, 29.66), (29.2, 60.0), (29.2, 95.0), (29.2, 481.0), (29.2, 31_000.0), (20.0, 5e8)])
def test_a_logarithmic_axis_has_numbers_that_differ(perplexities: tuple[float, float]) -> None:
    axes = new_figure(3.6, 3.3).subplots()
    axes.plot([0, 1], perplexities)
    logarithmic(axes)
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
    assert len(labels) >= 2
    assert len(set(labels)) == len(labels)
    assert not any("$" in label for label in labels)  # plain numbers, no formulas


def test_a_map_of_block_errors_grows_with_the_runs(tmp_path: Path) -> None:
    heights = []
    for runs in (2, 40):
        plot_block_error_map({f"run {index}": [0.1, 0.3, 0.2][: 3 - index % 2] for index in range(runs)}, tmp_path / "map.png")
        heights.append(int.from_bytes((tmp_path / "map.png").read_bytes()[20:24], "big"))
    assert heights[1] > heights[0] + 38 * 15


def test_progress_without_a_terminal_is_one_line_per_step() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with Progress(console) as progress:
        for name in ("a step", "a step", "another"):
            for done in range(4):
                progress(done, 3, name)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition(",")[0] for line in lines] == ["a step: 3 of 3", "a step: 3 of 3", "another: 3 of 3"]


@pytest.mark.parametrize("description", ["a step"])
def test_progress_on_a_terminal_shows_bars(description: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console) as progress:
        for done in range(4):
            progress(done, 3, description)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in shown
    assert "left" in shown


def test_notes_and_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("fptquant.reports.progress.time.monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with Progress(console) as progress:
        labeled = Labeled(progress, "mine: ")
        for done in range(60, 64):
            labeled(done, 70, "training", f"loss [{done}]")
            clock[0] += 16
        labeled.say("the loss [bold] rises")
        labeled(70, 70, "training", "loss 7")
    # What was done before the first call is no measure: 32 s for two steps, 16 s for each of the eight that are left.
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "mine: training: 62 of 70, about 128 s left, loss [62]",
        "mine: the loss [bold] rises",
        "mine: training: 70 of 70, 64.0 s, loss 7",
    ]


def test_a_note_stands_below_the_bars_until_its_step_ends() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console) as progress:
        progress(3, 9, "training", "loss 0.5")
        assert progress._bars is not None
        shown = [item for item in progress._bars.get_renderables() if isinstance(item, Text)]
        assert [text.plain for text in shown] == ["  loss 0.5"]
        progress.say("a line that stays")
        progress(9, 9, "training", "loss 0.25")
        assert not [item for item in progress._bars.get_renderables() if isinstance(item, Text)]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a line that stays" in text
    assert "training: loss 0.25" in text
    assert "3/9" in text


def test_callbacks_that_know_no_notes() -> None:
    calls: list[tuple[object, ...]] = []

    def three(done: int, total: int, description: str) -> None:
        calls.append((done, total, description))

    def four(done: int, total: int, description: str, note: str = "") -> None:
        calls.append((done, total, description, note))

    for callback in (three, four, Labeled(three, "a "), Labeled(four, "a ")):
        tell(callback, 1, 2, "step", "loss")
    tell(four, 1, 2, "step", "")
    assert calls == [
        (1, 2, "step"), (1, 2, "step", "loss"), (1, 2, "a step"), (1, 2, "a step", "loss"), (1, 2, "step", ""),
    ]  # fmt: skip
    with pytest.warns(RuntimeWarning, match="^it rises$"):
        say(three, "it rises")


def test_latex_tells_a_failed_cell_from_one_that_was_not_run() -> None:
    measured = Evaluation(29.2, 0.1, 0.9, 8184, 3.0, "a text")
    rows = [
        Row("rtn", "w4a16", measured, 3.0),
        Row("rtn", "w4a4-static, automatic prefix", None, None, error="out of luck"),
        Row("gptq", "w4a16", None, None, error="out of luck", published=8.56),
        Row("awq", "w4a4-static", measured, 3.0),
    ]
    text = latex_table(rows, title="t")
    assert r"method & w4a16 & w4a4-static \\" in text
    assert r"rtn & \textbf{29.20} & failed \\" in text
    assert r"gptq & failed (8.56) & -- \\" in text
    broken = replace(rows[0], evaluation=replace(measured, perplexity=float("inf")), published=8.56)
    assert r"rtn & \textbf{infinite} (8.56) \\" in latex_table([broken], title="t")
    assert r"awq & -- & \textbf{29.20} \\" in text


def test_methods_of_any_name_can_be_set_in_latex() -> None:
    row = Row("mine", "w4a16", Evaluation(29.2, 0.1, 0.9, 8184, 3.0, "a text"), 3.0)
    text = latex_table([replace(row, method=r"a_b^2~\c")], title="t")
    assert r"a\_b\textasciicircum{}2\textasciitilde{}\textbackslash{}c & \textbf{29.20} \\" in text
