"""The command line: what it shows, what a run writes, and that every bad input ends with one message and exit code 2."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import fptquant
from fptquant.cli import app
from fptquant.config.loading import describe_config, shipped_configs
from fptquant.evaluation import hidden
from fptquant.files import KeptFiles
from fptquant.reports.console import WIDEST, output_console
from fptquant.stages import find_prefix
from tests.tiny_folder import save_tiny_folder


def invoke(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def refused(model: Path | str, output: Path, *overrides: str, file: str = "smoke") -> str:
    """Runs, expects exit code 2, no traceback and nothing written; returns the message."""
    kept = sorted(output.parent.iterdir())
    result = invoke("run", file, f"model={model}", "--output", output, *overrides)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert sorted(output.parent.iterdir()) == kept
    return result.stderr


def test_saved_models_are_evaluated_in_one_table(model: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "static", tmp_path / "dynamic"]
    for run, setting in zip(runs, ("w4a8kv8-static", "w4a4kv4-dynamic"), strict=True):
        done = invoke("run", "smoke", f"model={model}", f"quantization={setting}", "quantization.prefix=[1]", "--output", run)
        assert done.exit_code == 0, done.output
    text = ["--text", "topics", "--windows", "2", "--window", "64"]
    table = invoke("evaluate", runs[0], runs[1] / "model", *text, "--output", tmp_path / "table")
    assert table.exit_code == 0, table.output
    found = json.loads((tmp_path / "table" / "metrics.json").read_text())["results"]
    expected = [json.loads((run / "metrics.json").read_text())["results"] for run in runs]
    for entry, own in zip(found, [expected[0][0], expected[0][1], expected[1][1]], strict=True):
        assert (entry["method"], entry["setting"]) == (own["method"], own["setting"])
        assert _without_seconds(entry["evaluation"]) == _without_seconds(own["evaluation"])
    assert "w4a4kv4-dynamic" in (tmp_path / "table" / "table.md").read_text()
    assert len(list((tmp_path / "table" / "configs").iterdir())) == 2
    for arguments, message in (
        ([model], "holds no calibrated model"),
        ([tmp_path / "none"], "there is no folder"),
        ([runs[0], runs[0] / "model"], "is given twice"),
        ([runs[0], "--windows", "few"], "--windows few is no number of windows; write at least 1, or all"),
        ([runs[0], "--window", "128", "--text", "topics"], "with a prefix of 1 tokens = 129 is longer than"),
        ([runs[0], "--output", tmp_path / "table"], "holds another run"),
    ):
        refused = invoke("evaluate", *arguments)
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr.replace("\n", " ")


def test_a_killed_evaluation_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run without training as of saved models."""
    monkeypatch.setattr(KeptFiles.__init__, "__defaults__", (0.0,))
    forward, last = hidden.last_hidden_states, [0]

    def interrupt(*arguments: Any) -> Any:
        last[0] -= 1
        if last[0] == 0:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr("fptquant.evaluation.evaluate.last_hidden_states", interrupt)
    run = ["run", "smoke", f"model={model}", "quantization=w4a8kv8-static", "evaluation.windows=3", "evaluation.window=32"]
    assert invoke(*run, "--output", tmp_path / "whole").exit_code == 0
    for arguments in (run, ["evaluate", tmp_path / "whole", "--text", "topics", "--windows", "3", "--window", "32"]):
        last[0] = 3
        killed = invoke(*arguments, "--output", tmp_path / "killed")
        assert killed.exit_code == 130, killed.output
        assert "the same command with --resume goes on" in killed.output.replace("\n", " ")
        assert (tmp_path / "killed.partial").is_dir()
        assert "unfinished run" in invoke(*arguments, "--output", tmp_path / "killed").stderr.replace("\n", " ")
        last[0] = 3
        done = invoke(*arguments, "--output", tmp_path / "killed", "--resume")
        assert done.exit_code == 0, done.output
        assert last[0] == 2  # one window was left
        assert [_without_seconds(entry["evaluation"]) for entry in results(tmp_path / "killed")] == [
            _without_seconds(entry["evaluation"]) for entry in results(tmp_path / "whole")
        ]
        assert not list((tmp_path / "killed").rglob("checkpoint*"))
        shutil.rmtree(tmp_path / "killed")


def results(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "metrics.json").read_text())["results"]
    return found


def _without_seconds(evaluation: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in evaluation.items() if key != "seconds"}


def test_a_run_writes_everything(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "mine"
    result = invoke("run", "smoke", f"model={model}", "quantization=w4a4kv4-dynamic", "--output", output)
    assert result.exit_code == 0, result.output
    assert "w4a4kv4-dynamic" in result.stdout
    assert {path.name for path in output.iterdir()} == {
        "config.yaml", "environment.json", "metrics.json", "table.md", "plots", "model",
    }  # fmt: skip
    assert {path.name for path in (output / "plots").iterdir()} == {"activations.png", "outliers.png", "block_errors.png"}
    results = json.loads((output / "metrics.json").read_text())["results"]
    assert [entry["method"] for entry in results] == ["full precision", "smoke"]
    assert results[0]["evaluation"]["jsd"] == 0
    assert results[1]["evaluation"]["jsd"] > 0
    assert len(results[1]["block_errors"]) == 2
    environment = json.loads((output / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["seed"] == 0
    repeated = invoke("validate", output / "config.yaml")
    assert "is valid: smoke, w4a4kv4-dynamic" in " ".join(repeated.stdout.split())
    again = invoke("run", output, "--output", output)
    assert again.exit_code == 2
    assert "holds another run" in again.stderr


def test_the_same_seed_gives_the_same_result(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptquant.reports.experiment._plot_magnitudes", lambda *arguments: None)
    found = []
    for name in ("a", "b"):
        assert invoke("run", "smoke", f"model={model}", "--output", tmp_path / name, "--no-save").exit_code == 0
        results = json.loads((tmp_path / name / "metrics.json").read_text())["results"]
        found.append([(entry["evaluation"]["perplexity"], entry["evaluation"]["jsd"]) for entry in results])
    assert found[0] == found[1]


def test_a_table_searches_for_the_prefix_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptquant.reports.experiment._plot", lambda *arguments: None)
    monkeypatch.setattr(find_prefix, "MASSIVE", 1.0)
    monkeypatch.setattr(find_prefix, "MASSIVE_RATIO", 5.0)
    searches: list[int] = []
    search = find_prefix.find_prefix
    monkeypatch.setattr(find_prefix, "find_prefix", lambda *given, **options: searches.append(1) or search(*given, **options))
    small = ["calibration.windows=2", "calibration.window=32", "evaluation={text: topics, windows: 1, window: 32}"]
    settings = "settings=[w4a16, w4a8kv8-static, w4a4kv4-dynamic]"
    done = invoke("table", "demo", f"models=[{model}]", settings, f"overrides={json.dumps(small)}", "-o", tmp_path / "demo")
    assert done.exit_code == 0, done.output
    assert len(searches) == 1
    rows = json.loads((tmp_path / "demo" / "metrics.json").read_text())["results"][1:]
    assert [", prefix of" in row["setting"] for row in rows] == [False, False, True, True, True, True]


def test_tables_in_a_file_have_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", io.StringIO())
        assert output_console().width == WIDEST
    monkeypatch.setenv("COLUMNS", "70")
    assert output_console().width == 70


def test_unknown_keys_all_at_once(model: Path, tmp_path: Path) -> None:
    message = refused(model, tmp_path / "out", "sed=1", "quantization.weight.bits=9", "transforms.up_scalin={}")
    for expected in ("3 mistakes", "did you mean seed?", "choose 2 to 8, or 16", "did you mean up_scaling?"):
        assert expected in message


def test_contradictory_settings(model: Path, tmp_path: Path) -> None:
    assert "norm_gains: kept is not possible" in refused(model, tmp_path / "out", "norm_gains=kept")


def test_missing_and_corrupt_models(model: Path, tmp_path: Path) -> None:
    assert "no-such-model" in refused(tmp_path / "no-such-model", tmp_path / "out")
    broken = save_tiny_folder(tmp_path / "broken")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors" in refused(broken, tmp_path / "out")


def test_unsupported_architecture(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    message = refused(folder, tmp_path / "out")
    assert "GPT2LMHeadModel" in message
    assert "LlamaForCausalLM" in message


def test_nan_in_the_weights(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(folder, tmp_path / "out")


def test_texts_and_windows(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "has 9 tokens, but 2 windows of 32 tokens need 64" in refused(model, tmp_path / "out", f"calibration.text={short}")
    assert "has 9 tokens, but 2 windows of 64 tokens need 128" in refused(model, tmp_path / "out", f"evaluation.text={short}")
    assert "longer than the model's context of 128" in refused(model, tmp_path / "out", "calibration.window=129")
    assert "longer than the model's context of 128" in refused(model, tmp_path / "out", "evaluation.window=4096")


def test_training_that_cannot_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "training.window = 129 is longer than the model's context of 128" in refused(
        model, tmp_path / "out", "training.window=129"
    )
    assert "there is no unfinished run" in invoke("run", "smoke", f"model={model}", "-o", tmp_path / "out", "--resume").stderr
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest))
    message = refused(model, tmp_path / "out", "training.window=64", "training.tensorboard=true")
    assert "pip install 'fptquant[tensorboard]'" in message


def test_impossible_hadamard_sizes_and_groups(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "odd", intermediate_size=66)
    message = refused(folder, tmp_path / "out")
    assert "66" in message
    assert "64" in message
    assert "does not divide the 64 inputs" in refused(folder, tmp_path / "out", "quantization=w4a16-g48", "transforms={}")


def test_outputs_that_cannot_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be written" in invoke("run", "smoke", f"model={model}", "-o", "/proc/run").stderr
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in refused(model, file)
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr("fptquant.reports.run_folder.shutil.disk_usage", lambda path: usage)
    assert "MB left" in refused(model, tmp_path / "out")


def test_debug_shows_the_traceback() -> None:
    result = invoke("validate", "rtn", "seed=x", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "seed: must be a valid integer" in result.stderr


def test_interruption(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fptquant.reports.experiment.calibrate", interrupt)
    result = invoke("run", "smoke", f"model={model}", "-o", tmp_path / "runs" / "out")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_show_ls_and_validate() -> None:
    listed = invoke("ls").stdout
    for word in ("fptquant-local", "rtn", "w4a8kv8-static", "smollm2-135m", "Qwen3ForCausalLM", "wikitext2"):
        assert word in listed
    shown = invoke("show", "fptquant-local", "quantization=w4a16").stdout
    assert "T_k" in shown
    assert "start: random_hadamard" in shown
    assert invoke("validate", "configs/methods/rtn.yaml").exit_code == 0
    assert "24 cells of 6 methods" in invoke("validate", "smollm2-toolkits", "methods=[rtn,rtn-lp,gptq,awq,quarot,spinquant]",
                                             "settings=[w4a16,w4a8,w8a8,w4a4]").stdout  # fmt: skip
    broken = invoke("validate", "demo", "methods=[rtn]", "settings=[w4a16]", "overrides=[seed=x]")
    assert broken.exit_code == 2
    assert "seed" in broken.output
    assert invoke("show", "fptquants").exit_code == 2
    assert "there is no file 'mine.yaml'" in invoke("validate", "mine.yaml").stderr


def test_ls_describes_by_whole_sentences() -> None:
    for path in shipped_configs().values():
        assert describe_config(path).endswith("."), path


def test_mistakes_in_names_are_found_without_torch(tmp_path: Path) -> None:
    (tmp_path / "made" / "cells").mkdir(parents=True)
    for arguments, message in (
        (["run", "rtn", "model=./no/where"], "model folder ./no/where does not exist"),
        (["run", "rtn", "model=smolm2-135m"], "did you mean smollm2-135m?"),
        (["run", "rtn", "--stream", "model=./no/where"], "model folder ./no/where does not exist"),
        (["table", "demo", "models=[./no/where]"], "model folder ./no/where does not exist"),
        (["evaluate", "no/run"], "there is no folder no/run"),
        (["report", str(tmp_path / "made")], "is a table; give one of its cells"),
    ):
        code = (
            "import sys\nfrom fptquant.cli import main\n"
            "try: main()\nexcept SystemExit as end: assert end.code == 2\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert message in done.stderr


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys, fptquant.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": str(Path.cwd())}).returncode == 0
    )
    assert "fptquant table demo" in invoke("--help").stdout
    assert "evaluation.text=wikitext2" in invoke("run", "--help").stdout
    assert "'methods=[rtn, gptq, fptquant-local]'" in invoke("table", "--help").stdout
    assert invoke("--version").stdout.startswith("fptquant 0.")


def test_diagnostics_name_the_build() -> None:
    from fptquant.diagnostics import diagnostics

    info = diagnostics()
    assert info["core"]["isa"] in ("scalar", "avx2", "avx512")
    assert info["core"]["isa_reason"]
    assert info["float32_products"] in ("oneDNN", "torch")
    found = subprocess.run([sys.executable, "-m", "fptquant"], capture_output=True, text=True, check=True)
    for word in ("C core", "instruction set", "CUDA", "torch", info["core"]["isa"]):
        assert word in found.stdout


def test_diagnostics_name_the_commit_of_the_code_that_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "fptquant").mkdir()
    for name in ("__init__", "diagnostics", "errors"):
        shutil.copy(Path(fptquant.__file__).with_name(f"{name}.py"), tmp_path / "fptquant")
    code = (
        "import subprocess\n"
        "def git(*arguments):\n"
        "    identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']\n"
        "    done = subprocess.run(['git', *identity, *arguments], check=True, capture_output=True, text=True)\n"
        "    return done.stdout.strip()\n"
        "git('init'), git('add', '.'), git('commit', '-m', 'first')\n"
        "first = git('rev-parse', 'HEAD')\n"
        "from fptquant.diagnostics import diagnostics\n"
        "git('commit', '--allow-empty', '-m', 'second')\n"
        "print(first, diagnostics()['commit'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, named = done.stdout.split()
    assert named == first


def test_diagnostics_name_a_mistake_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from fptquant.diagnostics import diagnostics

    monkeypatch.setenv("FPTQUANT_FLOAT32_PRODUCTS", "mkl")
    assert "must be auto, onednn or torch" in diagnostics()["float32_products"]


def test_an_impossible_instruction_set_is_one_message() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fptquant", "run", "rtn"],
        env={**os.environ, "FPTQUANT_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "mmx is not built" in done.stderr
    assert "Traceback" not in done.stderr
