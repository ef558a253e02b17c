"""``fptquant evaluate`` with zero-shot tasks and samples: tables, files, what is refused, and going on after a kill."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'fptquant[eval]')")

from fptquant import calibrate, evaluate_zero_shot, load_calibrated, load_config, load_model
from fptquant.cli import app
from fptquant.evaluation.lm_eval_model import LMEvalModel
from fptquant.files import KeptFiles
from fptquant.reports import page
from tests.evaluation.lm_eval_tiny import SHARED, closing_tokenizer, leave_machine_alone, write_tasks
from tests.tiny_folder import save_tiny_folder

TEXT = ["--text", "topics", "--windows", "2", "--window", "64"]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_machine_alone(monkeypatch)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run that quantized it, and files of tasks."""
    home = tmp_path_factory.mktemp("zero_shot")
    closing_tokenizer().save_pretrained(save_tiny_folder(home / "tiny"))
    write_tasks(home / "tasks", SHARED)
    config = load_config("smoke", f"model={home / 'tiny'}", "quantization=w4a8kv8-static")
    calibrate(*load_model(home / "tiny"), config).save(home / "run" / "model")
    return home


def test_tasks_and_samples_of_every_model(home: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", home / "tasks", "--limit", "2", "--batch-size", "4", "--samples", "2", "--output", tmp_path / "out"]
    done = invoke("evaluate", home / "run", *TEXT, *arguments)
    assert done.exit_code == 0, done.output
    plain, quantized = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    for entry, (model, tokenizer) in ((plain, load_model(home / "tiny")), (quantized, load_calibrated(home / "run" / "model"))):
        scores = evaluate_zero_shot(model, tokenizer, str(home / "tasks"), limit=2, batch_size=4)
        found = entry["zero_shot"]
        assert found["tasks"] == {name: score.as_dict() for name, score in scores.items()}
        assert found["mean_accuracy"] == pytest.approx(sum(score.metrics["acc"] for score in scores.values()) / 5)
        assert (found["limit"], found["batch_size"], found["seed"]) == (2, 4, 0)
    table = (tmp_path / "out" / "zero_shot.md").read_text()
    assert "| method | setting | piqa | arc_easy | boolq | winogrande | lambada_openai | mean |" in table
    assert "| full precision | float32 | " in table
    assert f"| {100 * quantized['zero_shot']['mean_accuracy']:.1f} |" in table
    assert f"| lambada_openai | perplexity | {plain['zero_shot']['tasks']['lambada_openai']['metrics']['perplexity']:.2f}±" in table
    assert "piqa 1.0: 2" in table
    samples = (tmp_path / "out" / "samples.md").read_text()
    assert samples.count("| full precision float32 | 48 of 48 |") == 2
    assert samples.count("| smoke w4a8kv8-static") == 2
    assert "zero-shot tasks" in done.stdout
    assert "sample 2" in done.stdout


def test_a_killed_evaluation_of_tasks_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeptFiles.__init__, "__defaults__", (0.0,))
    answer, count, last = LMEvalModel._answer_batch, [0], [5]

    def interrupt(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == last[0]:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(LMEvalModel, "_answer_batch", interrupt)
    output = tmp_path / "out"
    tasks = f"piqa={home}/tasks/piqa.jsonl,boolq={home}/tasks/boolq.jsonl"
    arguments = ["evaluate", home / "run", *TEXT, "--tasks", tasks, "--batch-size", "2", "--output", output]
    killed = invoke(*arguments)
    assert killed.exit_code == 130, killed.output
    assert "the same command with --resume goes on" in killed.output.replace("\n", " ")
    other = invoke(*arguments, "--resume", "--limit", "1")
    assert other.exit_code == 2
    assert "limit" in other.stderr
    done = invoke(*arguments, "--resume")
    assert done.exit_code == 0, done.output
    assert count[0] == 2 * (3 + 2) + 1  # for each model three batches of piqa, two of boolq; one was interrupted
    resumed = json.loads((output / "metrics.json").read_text())["results"]
    shutil.rmtree(output)
    assert invoke(*arguments).exit_code == 0
    whole = json.loads((output / "metrics.json").read_text())["results"]
    assert [entry["zero_shot"] for entry in resumed] == [entry["zero_shot"] for entry in whole]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "piqa=nowhere.jsonl"], "nowhere.jsonl of a zero-shot task does not exist"),
        (["--limit", "3"], "give tasks, too"),
        (["--samples", "3"], "3 samples are not possible with 2 windows"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("fptquant.reports.saved.load_model", lambda *unused, **options: pytest.fail("a model was loaded"))
    refused = invoke("evaluate", home / "run", *TEXT, *arguments)
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr.replace("\n", " ")


def test_help_names_the_extra() -> None:
    assert "pip install 'fptquant[eval]'" in " ".join(invoke("evaluate", "--help").stdout.replace("│", " ").split())


def test_runs_tables_and_reports_show_tasks_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero_shot = f"evaluation={{text: topics, windows: 2, window: 32, zero_shot: {{tasks: {home / 'tasks'}, limit: 2}}}}"
    done = invoke("run", "smoke", f"model={home / 'tiny'}", zero_shot, "quantization=w4a16", "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "zero-shot" in done.output
    plain, alone = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    scores = evaluate_zero_shot(*load_calibrated(tmp_path / "run" / "model"), str(home / "tasks"), limit=2)
    assert alone["zero_shot"]["tasks"] == {name: score.as_dict() for name, score in scores.items()}
    assert "| smoke | w4a16 | " in (tmp_path / "run" / "zero_shot.md").read_text()
    monkeypatch.setattr(page, "_histograms", lambda diagnosis: [])  # the slowest figures, which other tests have
    assert invoke("report", tmp_path / "run", "--no-sensitivity", "--samples", "0").exit_code == 0
    written = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert '<section id="zero-shot">' in written
    assert '<section id="samples">' not in written
    for entry in (plain, alone):
        for name, score in entry["zero_shot"]["tasks"].items():
            error = 100 * score["stderr"]["acc"]
            assert f"<td>{100 * score['metrics']['acc']:.1f}±{error:.1f}</td>" in written, name
        assert f"<td>{100 * entry['zero_shot']['mean_accuracy']:.1f}</td>" in written
    assert '>lambada_openai</td><td class="left">perplexity</td>' in written

    table = ["table", "demo", f"models=[{home / 'tiny'}]", "methods=[rtn, smoke]", "settings=[w4a16]", "-o", tmp_path / "table"]
    done = invoke(*table, f"overrides={json.dumps([zero_shot, 'quantization.prefix=null'])}")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "table" / "metrics.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["full precision", "rtn", "smoke"]
    assert rows[0]["zero_shot"] == plain["zero_shot"]
    assert rows[2]["zero_shot"] == alone["zero_shot"]
    text = (tmp_path / "table" / "table.md").read_text()
    assert "| zero-shot |" in text
    assert f"| {100 * alone['zero_shot']['mean_accuracy']:.1f} % |" in text
    assert (tmp_path / "table" / "zero_shot.md").read_text().count("| smoke | w4a16 |") == 1
    with (tmp_path / "table" / "table.csv").open() as file:
        assert [float(row["mean_accuracy"]) for row in csv.DictReader(file)] == [row["zero_shot"]["mean_accuracy"] for row in rows]
    refused = invoke(
        "run", "smoke", f"model={home / 'tiny'}", "evaluation.zero_shot={tasks: piqa=nowhere.jsonl}", "-o", tmp_path / "no"
    )
    assert refused.exit_code == 2
    assert "nowhere.jsonl" in refused.output
    assert not (tmp_path / "no").exists()
