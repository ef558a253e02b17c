"""The pictures of the method pages, drawn from the shipped configs whenever the site is built, so that they cannot grow old."""

from __future__ import annotations

from pathlib import Path

from fptquant.config.loading import load_config
from fptquant.reports.method_diagram import draw_method

ROOT = Path(__file__).parents[1]


def draw_all(folder: Path) -> None:
    """One SVG file for each method of configs/methods, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in sorted((ROOT / "configs" / "methods").glob("*.yaml")):
        draw_method(load_config(recipe), folder / f"{recipe.stem}.svg")
