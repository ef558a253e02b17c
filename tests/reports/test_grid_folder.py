"""The folder of a table: what is refused before anything is done, and which cells in it count."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fptquant.config.tables import load_table, table_cells
from fptquant.errors import UserError
from tests.reports.small_grid import SMALL, grid, make, scores
from tests.tiny_folder import save_tiny_folder


def test_mistakes_are_found_before_anything_is_done(model: Path, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            make(grid(tmp_path / "out", model, **changes), resume=changes.pop("resume", False))
        return str(caught.value)

    message = refused(methods=["rtm", {"name": "x", "method": "rtn", "overrides": ["sed=1"]}], settings=["w4a16", "w44"])
    for part in ("did you mean 'rtn'?", "did you mean seed?", "'w44' is not a setting"):
        assert part in message
    assert "is there twice" in refused(methods=["rtn", {"name": "rtn", "method": "rtn-lp"}])
    other = {"name": "long", "method": "rtn", "overrides": ["evaluation.windows=3"]}
    assert "evaluation is another than that of rtn" in refused(methods=["rtn", other])
    elsewhere = {"name": "elsewhere", "method": "rtn", "overrides": ["model=other"]}
    assert "an override names another model, other" in refused(methods=["rtn", elsewhere])
    assert "settings" in refused(settings=[])
    published = {"model": "tiny", "method": "rtn", "setting": "w4a16", "perplexity": 5.0, "source": "a paper"}
    assert "tinny is none of the models tiny; give a model this name" in refused(published=[published | {"model": "tinny"}])
    stray = [published | other for other in ({"method": "rtm"}, {"setting": "w4a4"}, {"setting": None})]
    full = {"method": "full precision"}
    message = refused(published=[*stray, published, published, published | full, published | {"setting": "w44", "alone": True}])
    for part in (
        "rtm is none of the methods full precision, rtn, rotated; correct it (did you mean rtn?), or say alone: true",
        "w4a4 is none of the settings w4a16, w4a4kv4-dynamic; correct it",
        "rtn on tiny has no setting; give one",
        "rtn, w4a16 on tiny is there twice; keep one",
        "full precision on tiny has a setting; leave it out",
        "'w44' is not a setting",
    ):
        assert part in message
    assert "did you mean methods?" in refused(method=["rtn"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="there is no table in"):
        make(grid(tmp_path / "out", model), resume=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "holds other files" in refused()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_pictures")
def test_a_table_does_not_mix_cells_of_other_settings(model: Path, tmp_path: Path) -> None:
    make(grid(tmp_path / "out", model, methods=["rtn"], settings=["w4a16"]))
    with pytest.raises(UserError, match=r"(?s)cells of other settings.*rtn-w4a16: seed: 0, now 1"):
        make(grid(tmp_path / "out", model, methods=["rtn"], settings=["w4a16"], overrides=[*SMALL, "seed=1"]), resume=True)


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_from_before_a_setting_existed_counts_as_with_its_default(model: Path, tmp_path: Path) -> None:
    asked = {"methods": ["rtn"], "settings": ["w4a16"]}
    made = make(grid(tmp_path / "out", model, **asked))
    file = made.folder / "cells" / "tiny" / "rtn-w4a16" / "config.yaml"
    text = file.read_text()
    assert text.count("centered: false\n") == 2
    file.write_text(re.sub(r" *centered: false\n", "", text))
    again = make(grid(tmp_path / "out", model, **asked), resume=True)
    assert [row.as_dict() for row in again.rows] == [row.as_dict() for row in made.rows]
    file.write_text(text + "gone: 1\n")
    with pytest.raises(UserError, match=r"(?s)cells of other settings.*rtn-w4a16: gone: 1, now absent"):
        make(grid(tmp_path / "out", model, **asked), resume=True)


@pytest.mark.usefixtures("no_pictures")
def test_full_precision_of_another_model_is_not_taken_for_its_own(model: Path, tmp_path: Path) -> None:
    made = make(grid(tmp_path / "out", model, methods=["rtn"], settings=["w4a16"]))
    shutil.rmtree(made.folder / "cells" / "tiny" / "rtn-w4a16")
    other = save_tiny_folder(tmp_path / "elsewhere" / "tiny", seed=1)
    with pytest.raises(UserError, match=r"(?s)cells of other settings.*full-precision\.json of tiny: model: .*elsewhere"):
        make(grid(tmp_path / "out", other, methods=["rtn"], settings=["w4a16"]), resume=True)


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_that_was_killed_before_it_said_what_it_is_begins_anew(model: Path, tmp_path: Path) -> None:
    table = grid(tmp_path / "out", model, methods=["rtn"], settings=["w4a16"])
    expected = scores(make(table))
    cell = tmp_path / "out" / "cells" / "tiny" / "rtn-w4a16"
    shutil.rmtree(cell)
    partial = cell.with_name("rtn-w4a16.partial")
    partial.mkdir()
    (partial / "config.yaml").write_text("name: [")
    (partial / "checkpoint.safetensors").write_bytes(b"half")
    made = make(table, resume=True)
    assert made.failed == []
    assert scores(made) == expected
    assert not partial.exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_from_before_something_was_measured_has_no_value_there(model: Path, tmp_path: Path) -> None:
    table = grid(tmp_path / "out", model, methods=["rtn"], settings=["w4a16"])
    made = make(table)
    assert made.rows[1].cpu_seconds is not None
    file = made.folder / "cells" / "tiny" / "rtn-w4a16" / "metrics.json"
    found = json.loads(file.read_text())
    for result in found["results"]:
        del result["cpu_seconds"], result["cuda_peak_bytes"]
    file.write_text(json.dumps(found))
    again = make(table, resume=True, run=False)
    assert again.rows[1] == replace(made.rows[1], cpu_seconds=None)
    assert "CPU seconds" not in (made.folder / "table.md").read_text()


def test_published_values_follow_what_overrides_leave_of_the_grid(tmp_path: Path) -> None:
    value = {"model": "tiny", "method": "rtn", "setting": "w4a16kv16-static", "perplexity": 5.0, "source": "a paper"}
    other = value | {"method": "rotated", "setting": "w4a4kv4-dynamic", "perplexity": 6.0}
    alone = value | {"method": "elsewhere", "alone": True}
    table = grid(tmp_path / "out", "tiny", published=[value, other, alone])
    assert table.published_value("tiny", "rtn", "w4a16") == table.published[0]  # another label of the same setting
    assert table.published_value("tiny", "rtn", "w4a4kv4-dynamic") is None
    assert len(table_cells(table)) == 4

    def kept(*overrides: str) -> list[str]:
        narrow = load_table(tmp_path / "out.yaml", *overrides)
        table_cells(narrow)
        return [value.method for value in narrow.published]

    assert kept("methods=[rtn]") == ["rtn", "elsewhere"]
    assert kept("settings=[w4a4kv4-dynamic]") == ["rotated", "elsewhere"]
    assert kept("published=[]") == []
    assert kept("models=[{name: other, model: tiny}]") == []
    with pytest.raises(UserError, match="nowhere is none of the methods"):
        kept("methods=[rtn]", f"published={json.dumps([value | {'method': 'nowhere'}])}")
