"""Run folders: whole or not at all, and refused before work where they could not be written."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest

from fptquant.errors import UserError
from fptquant.reports.run_folder import RUN_MARKER, check_output, run_folder, write_json


def write_run(path: Path, word: str, *, overwrite: bool = False) -> None:
    with run_folder(path, overwrite=overwrite) as folder:
        write_json(folder / RUN_MARKER, {"word": word})
        assert not (path / RUN_MARKER).exists() or overwrite


def test_a_run_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "deep" / "mine"
    write_run(target, "first")
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    assert json.loads((target / RUN_MARKER).read_text())["word"] == "first"


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with run_folder(tmp_path / "runs" / "mine") as folder:
            (folder / "table.md").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_what_others_made_meanwhile(tmp_path: Path) -> None:
    def fail() -> None:
        with run_folder(tmp_path / "runs" / "mine"):
            write_run(tmp_path / "runs" / "other", "other")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_a_parent_that_another_run_makes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def made_meanwhile(path: Path) -> None:
        make(path)
        raise FileExistsError(errno.EEXIST, "File exists", str(path))

    monkeypatch.setattr(Path, "mkdir", made_meanwhile)
    write_run(tmp_path / "runs" / "mine", "first")
    assert (tmp_path / "runs" / "mine" / RUN_MARKER).is_file()


def test_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    write_run(target, "first")
    with pytest.raises(UserError, match=r"holds another run; .* --overwrite"):
        check_output(target)
    with pytest.raises(UserError, match="holds another run"):
        write_run(target, "second")
    assert json.loads((target / RUN_MARKER).read_text())["word"] == "first"
    write_run(target, "second", overwrite=True)
    assert json.loads((target / RUN_MARKER).read_text())["word"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="other files than a run's"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "thesis.txt")


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "empty", "first")
    assert (tmp_path / "empty" / RUN_MARKER).is_file()


def test_places_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match="cannot be written"):
        check_output("/proc/fptquant-run")


def test_too_little_space_is_known_before_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MB left"):
        check_output(tmp_path / "mine", needed_bytes=1 << 60)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with run_folder(tmp_path / "runs" / "mine") as folder:
            (folder / "table.md").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_json_is_readable_by_everyone(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ppl": math.inf, "list": [1.5, math.nan], "none": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ppl": "inf", "list": [1.5, "nan"], "none": None}
