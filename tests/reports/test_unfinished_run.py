"""Folders of runs that may be killed: what stays, how a run goes on, and everything that is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fptquant.errors import UserError
from fptquant.reports.run_folder import RUN_MARKER
from fptquant.reports.unfinished_run import check_run, lasting_run_folder, partial_folder
from fptquant.training.checkpoint import CHECKPOINT

CONFIG = {"config.yaml": "name: mine\ntraining: {steps: 4, checkpoint_seconds: 60}\noutput: runs/a\n"}


def finish(target: Path, *, overwrite: bool = False, resume: bool = False) -> list[str]:
    """Runs to the end; returns what was in the folder at the beginning."""
    with lasting_run_folder(target, CONFIG, overwrite=overwrite, resume=resume) as folder:
        found = sorted(path.name for path in folder.iterdir())
        (folder / RUN_MARKER).write_text("{}")
    return found


def interrupt(target: Path, *, resume: bool = False, overwrite: bool = False, checkpoints: bool = True) -> KeyboardInterrupt:
    """Stops in the middle; returns the error with its notes."""
    try:
        with lasting_run_folder(target, CONFIG, resume=resume, overwrite=overwrite) as folder:
            (folder / "plots").mkdir()
            (folder / "model").mkdir()
            (folder / "metrics.jsonl").write_text("{}\n")
            if checkpoints:
                (folder / CHECKPOINT).write_bytes(b"state")
            raise KeyboardInterrupt
    except KeyboardInterrupt as interruption:
        return interruption


def test_an_interrupted_run_stays_and_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "mine"
    error = interrupt(target)
    assert [path.name for path in target.parent.iterdir()] == ["mine.partial"]
    assert partial_folder(target) == target.with_name("mine.partial")
    assert error.__notes__ == [
        f"the run until its last checkpoint is kept in {target}.partial: the same command with --resume goes on"
    ]
    assert finish(target, resume=True) == [CHECKPOINT, "config.yaml", "metrics.jsonl"]
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    assert sorted(path.name for path in target.iterdir()) == ["config.yaml", RUN_MARKER, "metrics.jsonl"]


def test_a_folder_of_checkpoints_stays_and_goes_on(tmp_path: Path) -> None:
    target, description = tmp_path / "mine", {"checkpoint/config.yaml": "name: mine\n"}

    def interrupted() -> None:
        with lasting_run_folder(target, description, lasting=["model"]) as folder:
            (folder / "model").mkdir()
            (folder / "tokenizer.json").touch()
            (folder / "checkpoint" / "checkpoint.json").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert "with --resume goes on" in caught.value.__notes__[0]
    with pytest.raises(UserError, match=r"has another config \(name: mine, now other\)"):
        check_run(target, {"checkpoint/config.yaml": "name: other\n"}, resume=True)
    with lasting_run_folder(target, description, lasting=["model"], resume=True) as folder:
        assert sorted(path.name for path in folder.rglob("*")) == ["checkpoint", "checkpoint.json", "config.yaml", "model"]
    assert [path.name for path in target.iterdir()] == ["model"]


def test_without_a_checkpoint_nothing_stays(tmp_path: Path) -> None:
    error = interrupt(tmp_path / "runs" / "mine", checkpoints=False)
    assert not hasattr(error, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_not_lost_by_mistake(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    interrupt(target)
    with pytest.raises(UserError, match=r"mine\.partial holds an unfinished run; go on with --resume, or .* --overwrite"):
        check_run(target, CONFIG)
    with pytest.raises(UserError, match="unfinished run"):
        finish(target)
    assert (tmp_path / "mine.partial" / CHECKPOINT).read_bytes() == b"state"
    assert finish(target, overwrite=True) == ["config.yaml"]


def test_what_cannot_go_on(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    with pytest.raises(UserError, match=r"there is no unfinished run .*mine\.partial .* leave out --resume"):
        check_run(target, CONFIG, resume=True)
    finish(target)
    with pytest.raises(UserError, match=r"mine is finished; leave out --resume and give --overwrite"):
        check_run(target, CONFIG, resume=True)
    with pytest.raises(UserError, match="holds another run"):
        check_run(target, CONFIG)


def test_a_finished_run_is_replaced_by_an_interrupted_one_only_if_asked(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    finish(target)
    (target / "old").touch()
    interrupt(target, overwrite=True)
    with pytest.raises(UserError, match=r"holds another run; .* --overwrite"):
        finish(target, resume=True)
    assert CHECKPOINT in finish(target, resume=True, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not (target / "old").exists()


def test_another_config_is_refused_by_the_names_of_its_keys(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    interrupt(target)
    other = {"config.yaml": "name: mine\ntraining: {steps: 5, checkpoint_seconds: 1, tensorboard: true}\nseed: 3\noutput: x\n"}
    with pytest.raises(UserError) as caught:
        check_run(target, other, resume=True)
    assert "another config (training.steps: 4, now 5; seed: absent, now 3); set these" in str(caught.value)
    (tmp_path / "mine.partial" / "config.yaml").write_text("[")
    with pytest.raises(UserError, match=r"config\.yaml is missing or damaged; start anew with --overwrite"):
        check_run(target, CONFIG, resume=True)


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    code = (
        "import sys; from fptquant.errors import UserError\n"
        "from fptquant.reports.unfinished_run import lasting_run_folder\n"
        "try:\n"
        "    with lasting_run_folder(sys.argv[1], {}, overwrite=True): pass\n"
        "except UserError as error: print(error)"
    )
    with lasting_run_folder(tmp_path / "mine", CONFIG) as folder:
        arguments = [sys.executable, "-c", code, str(tmp_path / "mine")]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert "another process is writing" in done.stdout
        assert (folder / "config.yaml").is_file()
