"""Text: the split of the topics, files, and WikiText-2 from a path, a local copy of the data set, or nowhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fptquant.data.text import load_text, topics
from fptquant.data.wikitext import WIKITEXT2_VARIABLE, WikiTextUnavailable
from fptquant.errors import UserError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No path, and a hub that refuses connections at once."""
    import datasets.config

    monkeypatch.delenv(WIKITEXT2_VARIABLE, raising=False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def test_topics_are_two_texts_without_a_common_paragraph() -> None:
    calibration, held_out = topics("calibration"), topics("evaluation")
    assert calibration == topics("calibration")
    assert not set(calibration.content.split("\n\n")) & set(held_out.content.split("\n\n"))
    assert len(calibration.content) > 200_000
    assert len(held_out.content) > 50_000
    assert "held-out" in held_out.name


@pytest.mark.usefixtures("offline")
def test_auto_falls_back_to_topics_and_says_so() -> None:
    assert load_text("auto", "evaluation") == topics("evaluation")


@pytest.mark.usefixtures("offline")
def test_wikitext_without_path_and_hub_fails_quickly() -> None:
    start = time.monotonic()
    with pytest.raises(WikiTextUnavailable, match=WIKITEXT2_VARIABLE):
        load_text("wikitext2", "evaluation")
    assert time.monotonic() - start < 20


def test_wikitext_from_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "raw-test.txt").write_text("one\n\ntwo", encoding="utf-8")
    for given in (tmp_path, tmp_path / "raw-test.txt"):
        monkeypatch.setenv(WIKITEXT2_VARIABLE, str(given))
        assert load_text("wikitext2", "evaluation").content == "one\n\ntwo"
        assert load_text("auto", "evaluation").name == "WikiText-2 test"
        with pytest.raises(UserError, match="train"):
            load_text("wikitext2", "calibration")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv(WIKITEXT2_VARIABLE, str(tmp_path / "binary.txt"))
    with pytest.raises(UserError, match=r"binary\.txt cannot be read"):
        load_text("auto", "evaluation")
    import datasets

    def broken(*args: object, **kwargs: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("a damaged file")

    (tmp_path / "wikitext-2-raw-v1").mkdir()
    (tmp_path / "raw-test.txt").unlink()
    monkeypatch.setattr(datasets, "load_dataset", broken)
    monkeypatch.setenv(WIKITEXT2_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be read: a damaged file"):
        load_text("auto", "evaluation")
    monkeypatch.setenv(WIKITEXT2_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="there is no such text"):
        load_text("auto", "evaluation")


def test_wikitext_from_the_data_set_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loading code of `datasets` on a folder laid out as the hub's repository: rows joined by two newlines."""
    import datasets

    repository = tmp_path / "wikitext"
    (repository / "wikitext-2-raw-v1").mkdir(parents=True)
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"text": ["", f" = {split} = \n", "words\n"]})
        rows.to_parquet(repository / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
    configs = "configs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    files = "".join(f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n" for split in ("train", "test"))
    (repository / "README.md").write_text(f"---\n{configs}{files}---\n", encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv(WIKITEXT2_VARIABLE, str(repository))
    assert load_text("wikitext2", "evaluation").content == "\n\n = test = \n\n\nwords\n"
    assert load_text("wikitext2", "calibration").content == "\n\n = train = \n\n\nwords\n"


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps({"text": word}) for word in ("a", "b")) + "\n", encoding="utf-8")
    assert load_text(str(lines), "calibration").content == "a\n\nb"
    lines.write_text('{"text": "a"}\n{"words": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        load_text(str(lines), "calibration")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="is empty"):
        load_text(str(empty), "evaluation")
    with pytest.raises(UserError, match="cannot read"):
        load_text(str(tmp_path / "missing.txt"), "evaluation")
    with pytest.raises(UserError, match="neither one of topics"):
        load_text("wikitext3", "evaluation")
