"""The picture of a method shows every transform of its recipe, where it is, and its quantizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

import fptquant as fq
from fptquant.config.schema import Config
from fptquant.config.transforms import TransformsConfig
from fptquant.reports.method_diagram import AT_RUN_TIME, BOXES, MERGED_INTO, PLACES, draw_method

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def symbols(config: Config) -> set[str]:
    """What the descriptions of the schema call the transforms that are used."""
    used = [name for name in TransformsConfig.model_fields if getattr(config.transforms, name) is not None]
    docs = [type(getattr(config.transforms, name)).__doc__ or "" for name in used]
    return {symbol.strip() for doc in docs for symbol in doc.partition(":")[0].split(",")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_transform_of_the_recipe_is_drawn(recipe: Path) -> None:
    config = fq.load_config(recipe)
    drawn = {word for text in texts(draw_method(config)) for word in text.split() if word.startswith("$")}
    assert {word.strip("$").replace("{", "").replace("}", "") for word in drawn} == symbols(config)


def test_every_transform_has_its_places() -> None:
    assert set(MERGED_INTO) | set(AT_RUN_TIME) == set(TransformsConfig.model_fields)
    assert {part for table in MERGED_INTO.values() for parts in table.values() for part in parts} <= set(BOXES)
    assert {place for table in AT_RUN_TIME.values() for places in table.values() for place in places} <= set(BOXES) | set(PLACES)


def test_quantizers_of_the_setting_are_drawn() -> None:
    def drawn(*overrides: str) -> list[str]:
        return texts(draw_method(fq.load_config("rtn", *overrides)))

    assert not [text for text in drawn("quantization=w4a16") if text.isdigit()]
    assert sorted(text for text in drawn("quantization=w4a8kv4-static") if text.isdigit()) == ["4", "4", "8", "8", "8", "8"]
    assert "q_proj · 4 bits" in drawn("quantization=w4a16")
    assert any("static ranges" in text for text in drawn("quantization=w4a8kv4-static"))
    assert any("ranges for every token" in text for text in drawn("quantization=w4a8kv4-dynamic"))
    eight = drawn("quantization=w4a4kv4-static", "quantization.overrides={down_in: {bits: 8}}")
    assert eight.count("8") == 1


def test_it_is_written_where_asked(tmp_path: Path) -> None:
    draw_method(fq.load_config("flatquant"), tmp_path / "flatquant.svg")
    assert "<svg" in (tmp_path / "flatquant.svg").read_text(encoding="utf-8")
