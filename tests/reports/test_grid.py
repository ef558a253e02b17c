"""Tables of several methods, settings and models: what they hold, and what becomes of them when something fails."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from fptquant.config.loading import load_config
from fptquant.config.tables import load_table, table_cells
from fptquant.errors import UserError
from fptquant.reports import experiment
from fptquant.reports.table import Row, latex_table
from fptquant.stages import find_prefix
from fptquant.stages.progress import quiet
from fptquant.training.checkpoint import Checkpoint, save_checkpoint
from tests.reports.small_grid import SMALL, TRANSFORMED, Listener, failing, grid, make, scores


def test_a_table_is_written_in_every_form(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    made = make(grid(folder, model, settings=["w4a4kv4-dynamic"], published=[
        {"model": "tiny", "method": "rotated", "setting": "w4a4kv4-dynamic", "perplexity": 8.56, "source": "a paper"},
        {"model": "tiny", "method": "full precision", "perplexity": 5.47, "source": "a paper"},
        {
            "model": "tiny", "method": "elsewhere", "setting": "w4a4kv4-dynamic", "perplexity": 7.25, "source": "a paper",
            "alone": True,
        },
    ]))  # fmt: skip
    assert [(row.method, row.published) for row in made.rows] == [
        ("full precision", 5.47), ("rtn", None), ("rotated", 8.56), ("elsewhere", 7.25),
    ]  # fmt: skip
    assert "| elsewhere | w4a4kv4-dynamic | - | 7.25 |" in (folder / "table.md").read_text()
    assert {path.name for path in folder.iterdir()} == {
        "table.yaml", "table.md", "table.csv", "table.tex", "metrics.json", "environment.json", "plots", "cells",
    }  # fmt: skip
    assert {path.name for path in (folder / "plots").iterdir()} == {"block_errors.png", "cost.png"}
    cell = folder / "cells" / "tiny" / "rotated-w4a4kv4-dynamic"
    assert {path.name for path in (cell / "plots").iterdir()} == {"activations.png", "outliers.png", "block_errors.png"}
    text = (folder / "table.md").read_text()
    heads = (
        "method | setting | perplexity | published | JSD | KL | top-1 | added MACs | scales | seconds | CPU seconds | peak MiB |"
    )
    assert heads in text
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) == 3
    assert links[-1] == "plots/cost.png"
    assert all((folder / link).is_file() for link in links)
    measured = made.rows[2].evaluation
    assert measured is not None
    assert "Published values: a paper." in text
    assert f"| 8.56 ({measured.perplexity - 8.56:+.2f}) |" in text
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]["perplexity"]) == measured.perplexity
    assert [row["scales"] for row in rows] == ["", "dynamic", "dynamic", ""]
    assert [row["difference"] for row in rows[1::2]] == ["", ""]
    assert float(rows[2]["difference"]) == measured.perplexity - 8.56
    assert int(rows[2]["added_macs"]) > int(rows[1]["added_macs"]) == 0
    assert int(rows[2]["peak_bytes"]) > 2**20
    assert float(rows[2]["cpu_seconds"]) > 0
    assert rows[0]["cpu_seconds"] == rows[2]["cuda_peak_bytes"] == ""
    latex = (folder / "table.tex").read_text()
    assert r"method & w4a4kv4-dynamic \\" in latex
    assert latex.count(r"\textbf") == 1
    assert "rotated & " in latex
    assert f"(8.56, ${measured.perplexity - 8.56:+.2f}$)" in latex
    assert re.search(r"full precision & [\d.]+ \(5.47, \$[+-][\d.]+\$\) ", latex)
    alone = latex_table([Row("full precision", "-", None, None, published=5.47), made.rows[1]], title="t")
    assert "full precision & (5.47) " in alone
    assert r"elsewhere & (7.25) \\" in latex


def test_cells_are_run_folders(model: Path, tmp_path: Path) -> None:
    made = make(grid(tmp_path / "out", model, methods=[TRANSFORMED], settings=["w4a16"]))
    cell = tmp_path / "out" / "cells" / "tiny" / "rotated-w4a16"
    assert {path.name for path in cell.iterdir()} == {"config.yaml", "environment.json", "metrics.json", "table.md", "plots"}
    found = json.loads((cell / "metrics.json").read_text())["results"][1]
    assert found["evaluation"]["perplexity"] == scores(made)["rotated", "w4a16"]
    alone = experiment.run_experiment(
        table_cells(load_table(tmp_path / "out.yaml"))[0].config, title="alone", output=tmp_path / "alone", progress=quiet
    )
    evaluation = alone.rows[1].evaluation
    assert evaluation is not None
    assert evaluation.perplexity == found["evaluation"]["perplexity"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_a_cell_that_fails_is_reported_and_tried_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    table, folder = grid(tmp_path / "out", model), tmp_path / "out"
    with monkeypatch.context() as patched:
        begun = failing(patched, lambda cell: cell == "rtn w4a4kv4-dynamic", error)
        made = make(table)
    assert len(begun) == 4
    (failed,) = made.failed
    assert (failed.method, failed.evaluation) == ("rtn", None)
    assert failed.error is not None
    assert failed.error.endswith("out of luck")
    text = (folder / "table.md").read_text()
    assert "failed" in text
    assert "out of luck" in text
    traces = list(folder.rglob("*.error.txt"))
    assert len(traces) == (error is RuntimeError)
    assert "\n\n3 of 4 cells, 1 failed.\n\n" in text
    latex = (folder / "table.tex").read_text()
    assert latex.partition("\n")[0].endswith(", 3 of 4 cells, 1 failed")
    assert re.search(r"rtn & [\d,.]+ & failed ", latex)
    (link,) = re.findall(r"\[failed\]\((.*?)\)", text)
    assert load_config(folder / link).name == "rtn"
    assert yaml.safe_load((folder / link).read_text())["quantization"]["activation"]["bits"] == 4
    begun = failing(monkeypatch, lambda cell: False, error)
    assert [row.as_dict() for row in make(table, resume=True, run=False).failed] == [failed.as_dict()]
    assert (folder / "table.md").read_text() == text
    assert begun == []
    whole = make(table, resume=True)
    assert begun == ["rtn w4a4kv4-dynamic"]
    assert whole.failed == []
    assert " cells" not in (folder / "table.md").read_text().partition("\n| ")[0]
    assert {**scores(whole), ("rtn", "w4a4kv4-dynamic"): None} == scores(made)
    assert not list(folder.rglob("*.error.*"))
    assert not list(folder.rglob("checkpoint*"))


@pytest.mark.usefixtures("no_pictures")
def test_a_failure_is_known_until_its_cell_succeeds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, folder = grid(tmp_path / "out", model, methods=["rtn"]), tmp_path / "out"
    with monkeypatch.context() as patched:
        failing(patched, lambda cell: cell == "rtn w4a16", RuntimeError)
        make(table)
    with monkeypatch.context() as patched:
        failing(patched, lambda cell: True, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            make(table, resume=True)
    (failed,) = make(table, resume=True, run=False).failed
    assert failed.error == "RuntimeError: out of luck"
    with monkeypatch.context() as patched:
        failing(patched, lambda cell: True, UserError)
        (failed,) = make(table, resume=True).failed
    assert failed.error == "out of luck"
    assert not list(folder.rglob("*.error.txt"))  # the trace of an error that is not the last one
    other = grid(folder, model, methods=["rtn"], settings=["w4a16"], overrides=[*SMALL, "seed=1"])
    shutil.rmtree(folder / "cells" / "tiny" / "rtn-w4a4kv4-dynamic")
    assert make(other, resume=True, run=False).failed == []
    table = grid(folder, model, methods=["rtn"])
    make(grid(tmp_path / "part", model, methods=["rtn"], settings=["w4a16"]))
    taken = make(table, resume=True, parts=[tmp_path / "part"], run=False)
    assert taken.failed == []
    assert "\n\n1 of 2 cells.\n\n" in (folder / "table.md").read_text()
    assert not list(folder.rglob("*.error.*"))


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_table_goes_on_and_may_grow(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(grid(tmp_path / "whole", model))
    table = grid(tmp_path / "out", model, methods=["rtn"])
    with monkeypatch.context() as patched:
        failing(patched, lambda cell: cell == "rtn w4a4kv4-dynamic", KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            make(table)
    assert (tmp_path / "out" / "table.md").read_text().count("| rtn |") == 1
    with pytest.raises(UserError, match="holds a table; go on with --resume"):
        make(table)
    begun = failing(monkeypatch, lambda cell: False, UserError)
    grown = make(grid(tmp_path / "out", model), resume=True)
    assert begun == ["rotated w4a16", "rtn w4a4kv4-dynamic", "rotated w4a4kv4-dynamic"]
    assert scores(grown) == scores(whole)
    begun.clear()
    assert scores(make(grid(tmp_path / "out", model), resume=True)) == scores(whole)
    assert begun == []
    make(grid(tmp_path / "out", model, methods=["rtn"], settings=["w4a16"]), overwrite=True)
    assert begun == ["rtn w4a16"]
    assert len(list((tmp_path / "out" / "cells" / "tiny").glob("*/config.yaml"))) == 1


@pytest.mark.usefixtures("no_pictures")
def test_machines_share_a_table(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(grid(tmp_path / "whole", model))
    make(grid(tmp_path / "a", model, methods=["rtn"]))
    make(grid(tmp_path / "b", model, methods=[TRANSFORMED], settings=["w4a16"]))
    other = {**TRANSFORMED, "overrides": [*TRANSFORMED["overrides"], "seed=7"]}
    make(grid(tmp_path / "c", model, methods=[other], settings=["w4a4kv4-dynamic"]))
    parts, listener = [tmp_path / name for name in "abc"], Listener()
    begun = failing(monkeypatch, lambda cell: False, UserError)
    taken = make(grid(tmp_path / "out", model), parts=parts, run=False, progress=listener)
    assert begun == []
    assert {**scores(taken), ("rotated", "w4a4kv4-dynamic"): scores(whole)[("rotated", "w4a4kv4-dynamic")]} == scores(whole)
    assert len(listener.said) == 1
    assert "left where it is" in listener.said[0]
    assert "seed" in listener.said[0]
    cells = tmp_path / "out" / "cells" / "tiny"
    assert all(str(path) not in text.read_text() for path in parts for text in cells.rglob("*.yaml"))
    assert (cells / "rtn-w4a16" / "metrics.json").read_bytes() == (tmp_path / "a/cells/tiny/rtn-w4a16/metrics.json").read_bytes()
    made = make(grid(tmp_path / "out", model), parts=parts, resume=True)
    assert begun == ["rotated w4a4kv4-dynamic"]
    assert scores(made) == scores(whole)


def test_parts_of_a_table_that_cannot_be_taken(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no table"):
        make(grid(tmp_path / "out", model), parts=[tmp_path])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.yaml").write_text("")
    with pytest.raises(UserError, match="is the output itself"):
        make(grid(tmp_path / "out", model), parts=[tmp_path / "out"], resume=True)
    empty = make(grid(tmp_path / "empty", model), run=False)
    assert empty.rows == []
    assert "| method |" in (tmp_path / "empty" / "table.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_table_is_not_given_up_for_a_model_that_cannot_be_had(model: Path, tmp_path: Path) -> None:
    make(grid(tmp_path / "out", model, methods=["rtn"], settings=["w4a16"]))
    with pytest.raises(UserError, match="nowhere"):
        make(grid(tmp_path / "out", tmp_path / "nowhere", methods=["rtn"], settings=["w4a16"]), overwrite=True)
    assert (tmp_path / "out" / "cells" / "tiny" / "rtn-w4a16" / "metrics.json").is_file()


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_cell_goes_on_with_the_prefix_that_another_has_searched_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second cell of a session is given what the first has found; when it goes on it is the first, and searches itself."""
    monkeypatch.setattr(find_prefix, "MASSIVE", 1.0)
    monkeypatch.setattr(find_prefix, "MASSIVE_RATIO", 5.0)
    training = ["training={steps: 3, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1, checkpoint_seconds: 0}"]
    settings = {"methods": ["rtn"], "settings": ["w4a8kv8-static", "w4a4kv4-static"], "overrides": [*SMALL, *training]}
    whole = make(grid(tmp_path / "whole", model, **settings))
    assert "prefix of" in whole.rows[2].setting

    def stop(path: Path, saved: Checkpoint) -> None:
        save_checkpoint(path, saved)
        if "w4a4" in str(path) and saved.position.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fptquant.training.train_end_to_end.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            make(grid(tmp_path / "out", model, **settings))
    gone_on = make(grid(tmp_path / "out", model, **settings), resume=True)
    assert gone_on.failed == []
    assert scores(gone_on) == scores(whole)


@pytest.mark.usefixtures("no_pictures")
def test_a_model_that_cannot_be_had(model: Path, tmp_path: Path) -> None:
    listener = Listener()
    models = [{"name": "missing", "model": str(tmp_path / "nowhere")}, str(model)]
    made = make(grid(tmp_path / "out", model, models=models, methods=["rtn"]), progress=listener)
    assert [(row.model, row.evaluation is None) for row in made.rows] == [
        ("missing", True), ("missing", True), ("tiny", False), ("tiny", False), ("tiny", False),
    ]  # fmt: skip
    assert len(listener.said) == 2
    assert "nowhere" in listener.said[0]
    assert "| model | method |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_what_a_model_cannot_do_fails_before_any_cell_is_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = failing(monkeypatch, lambda cell: False, UserError)
    impossible = {
        "name": "wide",
        "method": "rtn",
        "overrides": ["quantization.weight={bits: 4, granularity: per_group, group_size: 48}"],
    }
    made = make(grid(tmp_path / "out", model, methods=[impossible, "rtn"], settings=["w4a16"]))
    assert begun == ["rtn w4a16"]
    assert [row.method for row in made.failed] == ["wide"]
    assert "does not divide" in str(made.failed[0].error)
