"""The content of the page of a report: what each of its sections shows."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, BinaryIO

import yaml

from fptquant.config.loading import dump_config
from fptquant.config.schema import Config
from fptquant.evaluation.outliers import MassiveActivation, PlaceOutliers
from fptquant.evaluation.places import PLACES
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.quantizers.sites import layer_and_site
from fptquant.reports.diagnosis import Diagnosis, Look
from fptquant.reports.diagnostic_plots import (
    draw_block_training,
    draw_histogram,
    draw_layer_sensitivity,
    draw_sensitivity,
    draw_sqnr,
    draw_training,
    to_svg,
)
from fptquant.reports.plots import draw_block_errors, plot_activations, plot_outliers
from fptquant.reports.samples import CAPTION as SAMPLES_CAPTION
from fptquant.reports.samples import Samples, visible
from fptquant.reports.table import Row, caption, column_titles, format_perplexity, texts
from fptquant.reports.zero_shot import metric_lines, task_lines, zero_shot_caption
from fptquant.rounding.round_weights import damping_note

TEMPLATE = "report.html.jinja"
_MOST_ROWS = 10
"""Lines of a list of massive activations."""
_FEATURES = 4
"""Outlier features that are listed of each place."""
_WEAKEST = 5
"""Quantizers that are named as the worst."""


@dataclass(frozen=True)
class Run:
    """What a finished run has written down."""

    results: list[Row]
    """The run's table; none for a model that was saved by itself."""
    calibration: dict[str, Any]
    environment: dict[str, Any]
    training: dict[str, list[dict[str, Any]]]
    """Lines of metrics.jsonl by the key of the stage in a config."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    uri: str
    alt: str
    kind: str
    """How the page treats it: a ``chart`` may change its colors with the page, a ``map`` or ``wide`` picture may not."""


def _chart(figure: Any, alt: str) -> Picture:
    return Picture(_uri(to_svg(figure, transparent=True), "svg+xml"), alt, "chart")


def _map(figure: Any, alt: str) -> Picture:
    return Picture(_uri(to_svg(figure), "svg+xml"), alt, "map")


def _wide(plot: Callable[[BinaryIO], None], alt: str) -> Picture:
    buffer = io.BytesIO()
    plot(buffer)
    return Picture(_uri(buffer.getvalue(), "png"), alt, "wide")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def render(config: Config, run: Run, diagnosis: Diagnosis) -> str:
    """The page. Everything in it that comes from outside is escaped by the template."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("fptquant.reports").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    windows, window = diagnosis.tokens.shape
    return (
        template.render(
            title=f"{config.name}, {config.quantization.label}",
            model=config.model,
            facts=_facts(config, run),
            headline=_headline(run.results),
            columns=column_titles(run.results),
            rows=texts(run.results),
            caption=caption(run.results) if run.results else "",
            **_zero_shot_part(run.results),
            samples=_samples(diagnosis.samples),
            samples_caption=SAMPLES_CAPTION,
            measured=f"{windows} × {window} tokens of {diagnosis.text_name}",
            errors=_chart(
                draw_block_errors({config.name: diagnosis.errors}, size=(5.8, 3.3)), "SQNR of the residual after every block"
            ),
            **_sqnr_part(diagnosis),
            **_sensitivity_part(diagnosis),
            **_outlier_part(config, diagnosis),
            histograms=_histograms(diagnosis),
            training=_training(config, run),
            stages=_stages(run.calibration),
            damping=damping_note(run.calibration.get("rounding", {}), config),
            config=dump_config(config),
            environment=yaml.safe_dump(run.environment, sort_keys=False),
        )
        + "\n"
    )


def _facts(config: Config, run: Run) -> list[tuple[str, str]]:
    versions = run.environment.get("versions", {})
    core = run.environment.get("core", {})
    return [
        ("method", config.name),
        ("setting", config.quantization.setting),
        ("model", config.model),
        ("transforms", ", ".join(config.transforms.used) or "none"),
        ("sites", config.quantization.sites),
        ("calibrated on", f"{config.calibration.text}, {config.calibration.windows} × {config.calibration.window} tokens"),
        ("seed", str(config.seed)),
        ("dtype", config.dtype),
        ("fptquant", f"{run.environment.get('fptquant', '?')}, commit {str(run.environment.get('commit') or 'unknown')[:12]}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("machine", f"{run.environment.get('cpu', '?')}, {core.get('isa', '?')}, threads: {run.environment.get('threads', '?')}"),
    ]


def _headline(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The numbers to see first, of the quantized model in a run of one."""
    evaluations = [row.evaluation for row in rows if row.evaluation is not None]
    if len(evaluations) != 2:
        return []
    full, mine = evaluations
    agreement = "-" if mine.top1_agreement is None else f"{100 * mine.top1_agreement:.1f} %"
    return [
        (format_perplexity(full.perplexity), "perplexity in full precision"),
        (format_perplexity(mine.perplexity), "perplexity quantized"),
        ("-" if mine.jsd is None else f"{mine.jsd:.4f}", "JSD from full precision"),
        (agreement, "same likeliest token"),
    ]


def _zero_shot_part(rows: Sequence[Row]) -> dict[str, Any]:
    """Heads and lines of the tables by task and by metric; no lines if no task was scored."""
    lines = list(task_lines(rows))
    return {
        "tasks": lines,
        "task_metrics": list(metric_lines(rows)) if lines else [],
        "tasks_caption": zero_shot_caption(rows) if lines else "",
    }


def _samples(samples: Samples | None) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Each prompt, with model, continuation and tokens that agree with the full-precision model's."""
    if samples is None:
        return []
    return [
        (visible(prompt), [(name, text, same) for name, same, text in samples.lines(number)])
        for number, prompt in enumerate(samples.prompts)
    ]


def _sqnr_part(diagnosis: Diagnosis) -> dict[str, Any]:
    finite = sorted((value, name) for name, value in diagnosis.sqnr.items() if math.isfinite(value))
    inside = {name: value for name, value in diagnosis.sqnr.items() if layer_and_site(name)[0] is not None}
    return {
        "sqnr": _map(draw_sqnr(inside, diagnosis.layers), "SQNR of every quantizer by layer and site") if inside else None,
        "weakest": [(name, f"{value:.1f} dB") for value, name in finite[:_WEAKEST]],
        "once": [(name, f"{value:.1f} dB") for name, value in diagnosis.sqnr.items() if name not in inside],
        "exact": any(math.isinf(value) for value in diagnosis.sqnr.values()),
    }


def _sensitivity_part(diagnosis: Diagnosis) -> dict[str, Any]:
    scan = diagnosis.sensitivity
    whole = [each for each in scan if each.layer is None]
    layered = draw_layer_sensitivity(scan, diagnosis.layers) if len(whole) < len(scan) else None
    return {
        "sensitivity": _chart(draw_sensitivity(scan), "divergence with each kind of site quantized alone") if scan else None,
        "layer_sensitivity": None if layered is None else _map(layered, "divergence with one site of one layer quantized"),
        "sensitivity_rows": [
            (each.site, format_perplexity(each.evaluation.perplexity), f"{each.evaluation.jsd or 0.0:.5f}") for each in whole
        ],
    }


def _outlier_part(config: Config, diagnosis: Diagnosis) -> dict[str, Any]:
    before, after = diagnosis.before, diagnosis.after
    pictures = []
    if config.transforms.used:
        for plot, alt in ((plot_activations, "magnitudes by token and channel"), (plot_outliers, "magnitudes as landscapes")):
            pictures.append(_wide(lambda file, plot=plot: plot(before.activations, after.activations, file, title=""), alt))  # type: ignore[misc]
    return {
        "places": [
            (place.title, *map(" → ".join, zip(_counts(before.outliers[name]), _counts(after.outliers[name]), strict=True)))
            for name, place in PLACES.items()
        ],
        "outlier_lists": [
            (word, _feature_rows(look), _massive_rows(look, diagnosis.words))
            for word, look in (("in full precision", before), ("after calibration, quantizers off", after))
        ],
        "outlier_pictures": pictures,
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counts(found: PlaceOutliers) -> tuple[str, str, str]:
    return _number(found.largest), str(len(found.features)), f"{found.massive_count:,}"


def _feature_rows(look: Look) -> list[tuple[str, ...]]:
    """Place, channel, share of layers, share of positions, largest magnitude: the largest features of every place."""
    return [
        (
            PLACES[name].title, str(each.channel), f"{100 * each.layers:.0f} %", f"{100 * each.positions:.1f} %",
            _number(each.largest),
        )
        for name, place in look.outliers.items()
        for each in place.features[:_FEATURES]
    ]  # fmt: skip


def _massive_rows(look: Look, words: Mapping[tuple[int, int], str]) -> list[tuple[str, ...]]:
    """Place, value, times the median, layers, channel, token, position, window: one line for all layers of a token's channel."""
    groups: dict[tuple[str, int, int, int], list[MassiveActivation]] = {}
    for name, place in look.outliers.items():
        for each in place.massive:
            groups.setdefault((name, each.window, each.position, each.channel), []).append(each)
    rows = sorted(groups.items(), key=lambda group: -abs(group[1][0].value))[:_MOST_ROWS]
    return [
        (
            PLACES[name].title, f"{found[0].value:,.0f}", f"{found[0].ratio:,.0f}", _ranges(each.layer for each in found),
            str(channel), repr(words.get((window, position), "")), str(position), str(window),
        )
        for (name, window, position, channel), found in rows
    ]  # fmt: skip


def _ranges(layers: Iterable[int]) -> str:
    """Runs of numbers in few characters.

    >>> _ranges([4, 2, 3, 9])
    '2-4, 9'
    """
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _histograms(diagnosis: Diagnosis) -> list[tuple[str, list[tuple[str, Picture]]]]:
    """The figures of activations and of weights, each with its heading."""
    before, after = diagnosis.before.histograms, diagnosis.after.histograms

    def draw(name: str, title: str) -> tuple[str, Picture]:
        return title, _chart(draw_histogram(before[name], after[name]), f"histogram of {title} before and after")

    return [
        ("activations", [draw(name, place.title) for name, place in PLACES.items()]),
        ("weights", [draw(name, name) for name in LINEAR_NAMES]),
    ]


def _training(config: Config, run: Run) -> list[tuple[str, Picture]]:
    """The course of each stage that trains, with its heading."""
    found = []
    blocks = run.calibration.get("block_training", {}).get("blocks", [])
    if blocks:
        found.append(
            ("block training", _chart(draw_block_training(blocks), "block training: error of every block before and after"))
        )
    for settings in (config.training, config.range_training):
        entries = [] if settings is None else run.training.get(settings.key, [])
        if settings is not None and any(entry.get("kind") == "step" for entry in entries):
            picture = _chart(draw_training(entries, settings.objective), f"{settings.title}: loss and held-out divergence by step")
            found.append((settings.title, picture))
    return found


def _stages(calibration: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Name, seconds, and percent of all."""
    stages = {str(name): float(seconds) for name, seconds in calibration.get("stages", {}).items()}
    whole = sum(stages.values()) or 1.0
    return [(name, f"{seconds:,.1f}", round(100 * seconds / whole, 1)) for name, seconds in stages.items()]
