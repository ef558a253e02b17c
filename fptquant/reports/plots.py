"""Plots of a run: activation magnitudes before and after the transforms, and the error of every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fptquant.evaluation.places import PLACES
from fptquant.reports.statistics import ActivationStatistics
from fptquant.reports.table import Row

Array = npt.NDArray[np.float32]

BEFORE, AFTER = "#c8553d", "#2a6f97"
"""Colors that stay apart for color-blind readers and in print."""

_CYCLE = (AFTER, BEFORE, "#6a994e", "#7b2d8b", "#e09f3e", "#444444")
_MARKERS = "osD^vPX*"
_MAP_SIZE = (64, 192)
"""Cells of a heat map: tokens, channels."""
_SURFACE_SIZE = (32, 96)
_SURFACE_SITES = ("attn_in", "v_out", "mlp_in", "down_in")


def new_figure(width: float, height: float) -> Any:
    """A figure without any window system; pyplot is not touched, so a notebook's settings stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def bare_axes(axes: Any) -> None:
    """Leaves out the frame and draws faint horizontal lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def shrink(values: Array, size: tuple[int, int]) -> Array:
    """The largest value of every cell of a coarser raster, so that no outlier is lost.

    Shape:
        values: [rows, columns]; result: at most ``size``

    >>> shrink(np.array([[1, 9, 2, 3, 4]], dtype=np.float32), (1, 2)).tolist()
    [[9.0, 4.0]]
    """
    for axis in (0, 1):
        count = min(size[axis], values.shape[axis])
        starts = np.linspace(0, values.shape[axis], count, endpoint=False).round().astype(np.int64)
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values


def _map(statistics: ActivationStatistics, name: str, size: tuple[int, int]) -> Array:
    return shrink(_full_map(statistics, name), size)


def _full_map(statistics: ActivationStatistics, name: str) -> Array:
    """|x| of the layer that this place shows, [tokens, channels]."""
    magnitude = statistics[name].map
    assert magnitude is not None
    values: Array = magnitude.numpy()
    return values


def plot_activations(
    before: ActivationStatistics, after: ActivationStatistics, path: Path | BinaryIO, *, title: str = "Activation magnitudes"
) -> None:
    """One row per site: maps of tokens and channels before and after, and the largest and median value of every layer."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullFormatter

    figure = new_figure(13, 1.75 * len(PLACES) + 0.9)
    grid = figure.subplots(len(PLACES), 3, width_ratios=(1, 1, 1.15), squeeze=False)
    figure.suptitle(title, fontsize=14, x=0.01, ha="left", fontweight="bold")
    for row, (name, place) in enumerate(PLACES.items()):
        pair = [_map(statistics, name, _MAP_SIZE) for statistics in (before, after)]
        shapes = [_full_map(statistics, name).shape for statistics in (before, after)]
        high = max(float(values.max()) for values in pair) or 1.0
        low = max(min(float(np.median(values)) for values in pair) / 4, high * 1e-6)
        lowest = min(low, high / 10)
        norm = LogNorm(vmin=lowest, vmax=high)
        for column, (values, statistics) in enumerate(zip(pair, (before, after), strict=True)):
            axes = grid[row, column]
            extent = (0, shapes[column][1], shapes[column][0], 0)
            image = axes.imshow(
                np.maximum(values, lowest), norm=norm, cmap="magma", aspect="auto", extent=extent, interpolation="none"
            )
            site = statistics[name]
            axes.set_title(f"max {_number(site.largest[site.map_layer])}", fontsize=8, loc="right", pad=3)
            axes.tick_params(labelsize=7)
            if row == 0:
                axes.set_title(("before the transforms", "after")[column], fontsize=11, loc="left")
            if row == len(PLACES) - 1:
                axes.set_xlabel("channel", fontsize=9)
        grid[row, 0].set_ylabel(f"{place.title}\nlayer {before[name].map_layer}: token", fontsize=9)
        bar = figure.colorbar(image, ax=grid[row, :2], shrink=0.9, pad=0.01, aspect=14)
        bar.ax.tick_params(labelsize=7)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        _plot_layers(grid[row, 2], before, after, name, first=row == 0, last=row == len(PLACES) - 1)
    figure.savefig(path, dpi=110)


def _number(value: float) -> str:
    """Three figures without powers of ten, as far as magnitudes of activations go."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plot_layers(
    axes: Any, before: ActivationStatistics, after: ActivationStatistics, name: str, *, first: bool, last: bool
) -> None:
    for statistics, color, word in ((before, BEFORE, "before"), (after, AFTER, "after")):
        site = statistics[name]
        layers = range(len(site.largest))
        axes.semilogy(layers, site.largest, color=color, linewidth=1.8, marker="o", markersize=2.5, label=f"{word}, largest")
        axes.semilogy(layers, site.median, color=color, linewidth=1.2, linestyle=":", label=f"{word}, median")
    bare_axes(axes)
    axes.tick_params(labelsize=7)
    axes.set_ylabel("|x|", fontsize=9)
    if first:
        axes.set_title("every layer", fontsize=11)
        axes.legend(fontsize=7, ncols=2, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.02))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)
    if last:
        axes.set_xlabel("layer", fontsize=9)


def plot_outliers(
    before: ActivationStatistics, after: ActivationStatistics, path: Path | BinaryIO, *, title: str = "Outliers"
) -> None:
    """Magnitude over tokens and channels as a landscape, before above after, each pair of landscapes to the same scale."""
    from matplotlib.ticker import MaxNLocator
    from mpl_toolkits.mplot3d import Axes3D  # noqa: F401  registers the projection

    figure = new_figure(4.1 * len(_SURFACE_SITES), 7.6)
    grid = figure.subplots(2, len(_SURFACE_SITES), subplot_kw={"projection": "3d"})
    figure.suptitle(title, fontsize=15, x=0.01, ha="left", fontweight="bold")
    for column, name in enumerate(_SURFACE_SITES):
        height = float(max(_full_map(before, name).max(), _full_map(after, name).max())) or 1.0
        for row, (word, statistics) in enumerate((("before", before), ("after", after))):
            axes = grid[row, column]
            values = _map(statistics, name, _SURFACE_SIZE)
            magnitude = _full_map(statistics, name)
            tokens, channels = magnitude.shape
            x, y = np.meshgrid(np.linspace(0, channels, values.shape[1]), np.linspace(0, tokens, values.shape[0]))
            axes.plot_surface(
                x, y, values, cmap="turbo", vmin=0, vmax=height, rcount=values.shape[0],
                ccount=values.shape[1], linewidth=0, antialiased=False, shade=True,
            )  # fmt: skip
            axes.set_zlim(0, height)
            axes.view_init(elev=24, azim=-58)
            axes.tick_params(labelsize=7, pad=0)
            axes.set_xlabel("channel", fontsize=8, labelpad=2)
            axes.set_ylabel("token", fontsize=8, labelpad=2)
            heading = f"{PLACES[name].title}, layer {statistics[name].map_layer}\n" if row == 0 else ""
            axes.set_title(f"{heading}{word}: max |x| = {_number(float(magnitude.max()))}", fontsize=10, y=1.0, pad=-6)
            axes.set_box_aspect((1.25, 1, 0.8), zoom=0.98)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.savefig(path, dpi=110)


def plot_block_errors(
    errors: Mapping[str, Sequence[float]], path: Path, *, title: str = "Error of the residual after every block"
) -> None:
    """Writes `draw_block_errors` as a picture."""
    draw_block_errors(errors, title=title).savefig(path, dpi=110)


def draw_block_errors(errors: Mapping[str, Sequence[float]], *, title: str = "", size: tuple[float, float] = (9.5, 4.6)) -> Any:
    """Signal-to-quantization-noise ratio after every block for each method; higher is better."""
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(*size)
    axes = figure.subplots()
    if title:
        figure.suptitle(title, fontsize=13, x=0.01, ha="left", fontweight="bold")
    for index, (label, values) in enumerate(errors.items()):
        decibels = -20 * np.log10(np.maximum(np.asarray(values, dtype=np.float64), 1e-8))
        color = _CYCLE[index % len(_CYCLE)]
        style = ("-", "--", ":", "-.")[index // len(_CYCLE) % 4]
        axes.plot(decibels, color=color, linestyle=style, linewidth=1.8, marker="o", markersize=3, label=label)
    bare_axes(axes)
    axes.set_xlabel("block")
    axes.set_ylabel("SQNR in dB, higher is better")
    right = axes.secondary_yaxis("right")
    right.set_ylabel("relative error  ||x - y|| / ||x||")
    right.yaxis.set_major_formatter(FuncFormatter(lambda decibels, _: f"{10 ** (-decibels / 20):.2g}"))
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def plot_block_error_map(
    errors: Mapping[str, Sequence[float]], path: Path, *, title: str = "Error of the residual after every block"
) -> None:
    """The same for more runs than curves can be told apart: a line of colored cells for each run, a column for each block."""
    decibels = [-20 * np.log10(np.maximum(np.asarray(values, dtype=np.float64), 1e-8)) for values in errors.values()]
    columns = max(map(len, decibels))
    values = np.full((len(decibels), columns), np.nan)
    for row, found in enumerate(decibels):
        values[row, : len(found)] = found
    longest = max(map(len, errors))
    figure = new_figure(2.4 + 0.07 * longest + max(0.16 * columns, 3), 1.6 + 0.2 * len(errors))
    axes = figure.subplots()
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", fontweight="bold")
    image = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="none")
    axes.set_yticks(range(len(errors)), list(errors), fontsize=7.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("block", fontsize=9)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=40)
    bar.set_label("SQNR in dB, higher is better", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)


def plot_cost(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Perplexity of every method against what it adds at run time, a panel for each model and setting; lower left is better.

    Filled marks have ranges set beforehand, hollow ones find them for every token; the dashed line is full precision.
    """
    measured = [row for row in rows if row.evaluation is not None and row.cost is not None]
    panels = list(dict.fromkeys((row.model, row.label) for row in measured))
    full = {row.model: row.evaluation.perplexity for row in rows if row.evaluation is not None and row.cost is None}
    methods = list(dict.fromkeys(row.method for row in measured))
    columns = min(len(panels), 4)
    figure = new_figure(3.6 * columns + 1.6, 3.3 * -(-len(panels) // columns) + 0.6)
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharex=True)
    figure.suptitle(f"Perplexity against run-time cost: {title}", fontsize=13, x=0.01, ha="left", fontweight="bold")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (model, setting) in zip(grid.flat, panels, strict=False):
        for row in measured:
            if (row.model, row.label) == (model, setting):
                _plot_method(axes, row, methods.index(row.method))
        if model in full:
            axes.axhline(full[model], color="#888888", linestyle="--", linewidth=1)
        axes.set_title(" ".join(filter(None, (model, setting))), fontsize=10, loc="left")
        logarithmic(axes)
        bare_axes(axes)
        axes.tick_params(labelsize=8, which="both", labelbottom=True)
        axes.set_xlabel("added MACs, %", fontsize=9)
    grid[0, 0].set_ylabel("perplexity", fontsize=9)
    handles = {text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _perplexity_tick(value: float) -> str:
    """Four figures, and a power of ten from a million on.

    >>> _perplexity_tick(29.35), _perplexity_tick(30.0), _perplexity_tick(10_000.0), _perplexity_tick(1e7)
    ('29.35', '30', '10,000', '1e+07')
    """
    if value >= 1e6:
        return f"{value:.0e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers, at steps within a decade where it has few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _perplexity_tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plot_method(axes: Any, row: Row, index: int) -> None:
    assert row.evaluation is not None
    assert row.cost is not None
    color, marker = _CYCLE[index % len(_CYCLE)], _MARKERS[index // len(_CYCLE) % len(_MARKERS)]
    fill = "none" if row.cost.scales == "dynamic" else color
    perplexity = min(row.evaluation.perplexity, 1e300)
    axes.plot(100 * row.cost.share, perplexity, marker, color=color, markerfacecolor=fill, markersize=7, label=row.method)
