"""Figures of a report: errors by layer and site, sensitivity, histograms, and the course of training.

Drawn narrow, so that they can be read on a phone; without titles, which the page gives them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fptquant.evaluation.histograms import EDGES
from fptquant.evaluation.sensitivity import EVERYTHING, KINDS, NOTHING, Sensitivity
from fptquant.evaluation.sqnr import by_site
from fptquant.quantizers.sites import Kind, kind_of
from fptquant.reports.plots import AFTER, BEFORE, bare_axes, new_figure
from fptquant.reports.table import format_perplexity

_KIND_COLOR: dict[Kind, str] = {"weight": "#e09f3e", "activation": AFTER, "kv_cache": "#6a994e"}
_PLAIN = "#7a7a7a"
_MOST_NUMBERS = 1000
"""Cells of a heat map that are written out as well."""
_TAIL = 1e-3
"""Share of the smallest magnitudes that a histogram leaves out."""


def to_svg(figure: Any, *, transparent: bool = False) -> bytes:
    """The figure as a file, with the same bytes every time."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fptquant"}):  # otherwise ids are random
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    return buffer.getvalue()


def draw_sqnr(sqnr: Mapping[str, float], layers: int) -> Any:
    """Decibels of every quantizer of the blocks: layers downwards, sites from left to right."""
    return _heat_map(by_site(sqnr, layers), "SQNR in dB, higher is better", "{:.0f}", "cividis", logarithmic=False)


def draw_layer_sensitivity(scan: Sequence[Sensitivity], layers: int) -> Any:
    """Divergence with one site of one layer quantized: layers downwards, sites from left to right."""
    values = {f"layers.{each.layer}.{each.site}": 1000 * (each.evaluation.jsd or 0.0) for each in scan if each.layer is not None}
    return _heat_map(by_site(values, layers), "JSD in thousandths, lower is better", "{:.2g}", "magma_r", logarithmic=True)


def _heat_map(values: Mapping[str, Sequence[float]], label: str, form: str, colors: str, *, logarithmic: bool) -> Any:
    """One column for each site; infinite and missing values stay grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    cells = np.array(list(values.values()), dtype=np.float64).T  # [layers, sites]
    known = np.isfinite(cells)
    low, high = (float(cells[known].min()), float(cells[known].max())) if known.any() else (0.0, 1.0)
    if logarithmic:  # what is a thousandth of the worst is nothing
        high = max(high, 1e-6)
        low = max(low, high / 1000)
        cells = np.where(known, np.maximum(cells, low), cells)
    norm = (LogNorm if logarithmic else Normalize)(vmin=low, vmax=high if high > low else low * 1.01 + 1e-6)
    figure = new_figure(max(4.2, 0.44 * cells.shape[1] + 1.5), 0.17 * cells.shape[0] + 1.7)
    axes = figure.subplots()
    shown = colormaps[colors].with_extremes(bad="#c4c4c4")
    image = axes.imshow(np.ma.masked_invalid(cells), norm=norm, cmap=shown, aspect="auto", interpolation="none")
    axes.set_xticks(range(cells.shape[1]), list(values), rotation=90, fontsize=8)
    axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if cells.size <= _MOST_NUMBERS:
        _write_numbers(axes, cells, form, image)
    return figure


def _write_numbers(axes: Any, cells: npt.NDArray[np.float64], form: str, image: Any) -> None:
    """The value of every cell, dark on light colors and light on dark ones."""
    for (row, column), value in np.ndenumerate(cells):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value)) if np.isfinite(value) else (0.8, 0.8, 0.8, 1.0)
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
        text = form.format(value) if np.isfinite(value) else "∞"
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="#111111" if light else "#f5f5f5")


def draw_sensitivity(scan: Sequence[Sensitivity]) -> Any:
    """One bar for each kind of site: the divergence with it alone quantized, and the perplexity beside it."""
    from matplotlib.patches import Patch

    whole = [each for each in scan if each.layer is None]
    divergences = [max(each.evaluation.jsd or 0.0, 0.0) for each in whole]
    figure = new_figure(5.6, 0.27 * len(whole) + 1.1)
    axes = figure.subplots()
    rows = range(len(whole))
    axes.barh(rows, divergences, color=[_color(each.site) for each in whole], height=0.72)
    most = max(divergences, default=0.0) or 1.0
    for row, each, value in zip(rows, whole, divergences, strict=True):
        text = f"{value:.4f}, perplexity {format_perplexity(each.evaluation.perplexity)}"
        axes.text(value + 0.01 * most, row, text, va="center", fontsize=7.5)
    axes.axvline(divergences[0], color=_PLAIN, linewidth=0.8, linestyle=":")
    axes.set_yticks(rows, [each.site for each in whole], fontsize=8.5)
    axes.set_ylim(len(whole) - 0.4, -0.6)
    axes.set_xlim(0, 1.55 * most)
    axes.set_xlabel("JSD from full precision, lower is better", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    used = {kind for each in whole for kind in _KIND_COLOR if _color(each.site) == _KIND_COLOR[kind]}
    handles = [Patch(color=color, label=kind) for kind, color in _KIND_COLOR.items() if kind in used]
    if handles:
        axes.legend(handles=handles, fontsize=7.5, frameon=False, loc="lower right")
    return figure


def _color(site: str) -> str:
    """That of the kind of quantizer."""
    if site in (NOTHING, EVERYTHING):
        return _PLAIN
    together = {title: kind for kind, title in KINDS.items()}
    return _KIND_COLOR[together[site] if site in together else kind_of(site)]


def draw_histogram(before: Tensor, after: Tensor) -> Any:
    """Magnitudes before and after on logarithmic axes: the share of all values that each bin holds.

    The lowest bins, which together hold at most a thousandth of either, are left out, and zeros too; the last bin ends at infinity
    and is drawn as wide as the one before it.

    Shape:
        before, after: counts [bins]
    """
    figure = new_figure(3.6, 2.5)
    axes = figure.subplots()
    edges = EDGES.double().numpy()[1:].copy()
    edges[-1] = edges[-2] ** 2 / edges[-3]
    shares = [counts.double().numpy()[1:] / max(int(counts.sum()), 1) for counts in (before, after)]
    used = np.nonzero(shares[0] + shares[1])[0]
    last = int(used[-1]) + 1 if len(used) else len(edges) - 1
    first = min(last - 1, *(int(np.searchsorted(share.cumsum(), _TAIL)) for share in shares))
    for share, color, word in zip(shares, (BEFORE, AFTER), ("before", "after"), strict=True):
        axes.stairs(share[first:last], edges[first : last + 1], color=color, linewidth=1.4, label=word)
        axes.stairs(share[first:last], edges[first : last + 1], color=color, alpha=0.18, fill=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()  # they would take most of the time and of the file
    bare_axes(axes)
    axes.set_xlabel("|x|", fontsize=8)
    axes.set_ylabel("share of the values", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(frameon=False, fontsize=7.5, loc="lower center")
    return figure


def draw_block_training(blocks: Sequence[Mapping[str, Any]]) -> Any:
    """The held-out error of every block before and after it was trained, as metrics.json holds them."""
    figure = new_figure(5.8, 3.2)
    axes = figure.subplots()
    for key, color, label in (("initial", BEFORE, "before"), ("best", AFTER, "after")):
        axes.semilogy([block[key] for block in blocks], color=color, linewidth=1.6, marker="o", markersize=3, label=label)
    bare_axes(axes)
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel("error of the output", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_training(entries: Sequence[Mapping[str, Any]], objective: str) -> Any:
    """The loss of every step and the divergence on held-out windows, as metrics.jsonl holds them."""
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(5.8, 3.2)
    axes = figure.subplots()
    steps = [(entry["step"], entry["loss"]) for entry in entries if entry["kind"] == "step"]
    looks = [(entry["step"], entry["divergence"]) for entry in entries if entry["kind"] == "evaluation"]
    axes.plot(*zip(*steps, strict=True), color=BEFORE, linewidth=0.8, alpha=0.6, label=f"loss of a step ({objective})")
    if looks:
        axes.plot(*zip(*looks, strict=True), color=AFTER, linewidth=1.6, marker="o", markersize=3, label="held-out JSD")
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    bare_axes(axes)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("loss, JSD", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure
