"""Figures of a report: what they show at the edges, and that they come out the same every time."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fptquant.evaluation.evaluate import Evaluation
from fptquant.evaluation.histograms import count_magnitudes
from fptquant.evaluation.sensitivity import EVERYTHING, NOTHING, Sensitivity
from fptquant.reports.diagnostic_plots import (
    draw_histogram,
    draw_layer_sensitivity,
    draw_sensitivity,
    draw_sqnr,
    draw_training,
    to_svg,
)


def words(axes: object) -> list[str]:
    return [text.get_text() for text in axes.texts]  # type: ignore[attr-defined]


def measured(site: str, layer: int | None, jsd: float) -> Sensitivity:
    return Sensitivity(site, layer, Evaluation(20 + jsd, jsd, 0.5, 10, 0.0, "text"))


def test_the_heat_map_has_a_cell_for_every_quantizer() -> None:
    values = {"layers.0.attn_in": 20.4, "layers.1.attn_in": 31.0, "layers.1.down_proj.weight": math.inf}
    axes = draw_sqnr(values, 2).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attn_in", "down_proj.weight"]
    assert words(axes) == ["20", "31", "∞"]  # layer 0 has no quantizer of that weight
    assert axes.images[0].get_array().mask.tolist() == [[False, True], [False, True]]
    only = draw_sqnr({"layers.0.q_proj.weight": math.inf}, 1)
    assert words(only.axes[0]) == ["∞"]
    assert to_svg(only).startswith(b"<?xml")


def test_bars_say_divergence_and_perplexity() -> None:
    scan = [measured(NOTHING, None, -1e-9), measured(EVERYTHING, None, 0.4), measured("k_cache", None, 0.1)]
    axes = draw_sensitivity(scan).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [NOTHING, EVERYTHING, "k_cache"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0, 0.4, 0.1])
    assert words(axes)[1] == "0.4000, perplexity 20.40"
    layered = draw_layer_sensitivity([*scan, measured("k_cache", 1, 0.02), measured("k_cache", 0, 0.0)], 2).axes[0]
    assert words(layered)[1] == "20"


def test_histograms_show_shares_without_the_smallest_thousandth() -> None:
    x = torch.cat([torch.full((9,), 1e-6), torch.ones(5000), torch.full((4991,), 100.0)])
    axes = draw_histogram(count_magnitudes(x), count_magnitudes(x * 2)).axes[0]
    before, _, after, _ = (patch.get_data() for patch in axes.patches)
    assert before.edges[0] == 1
    assert before.values.max() == pytest.approx(0.5)
    assert before.edges[before.values.argmax()] == 1
    assert after.edges[after.values.argmax()] == 2
    zeros = count_magnitudes(torch.zeros(4))
    with pytest.warns(UserWarning, match="no positive"):  # of matplotlib: there is nothing to show
        to_svg(draw_histogram(zeros, zeros))


def test_training_without_held_out_windows() -> None:
    steps = [{"kind": "step", "step": step, "loss": 1.0 / step} for step in range(1, 5)]
    figure = draw_training(steps, "forward_kl")
    assert [line.get_label() for line in figure.axes[0].lines] == ["loss of a step (forward_kl)"]
    looks = [{"kind": "evaluation", "step": 0, "divergence": 0.5}]
    lines = draw_training([*steps, *looks], "jsd").axes[0].lines
    assert lines[1].get_xydata().tolist() == [[0, 0.5]]


def test_a_figure_is_the_same_every_time_and_has_no_date() -> None:
    first, second = (to_svg(draw_sqnr({"layers.0.attn_in": 3.0}, 1), transparent=True) for _ in range(2))
    assert first == second
    assert not re.search(rb"dc:date", first)
