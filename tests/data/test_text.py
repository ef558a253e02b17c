"""Text: the split of the topics, files, and WikiText-2 from a path, a local copy of the data set, or nowhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fptquant.data.text import Text, load_text, topics
from fptquant.data.wikitext import WIKITEXT2_VARIABLE, WikiTextUnavailable, joined_rows
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


ORIGINAL = " \n = Robert = \n \n He <unk> of Æ\x85, \u2028 1 @.@ 5 . \n Then he left . \n \n = = Life = = \n \n It ended . \n \n"
"""Lines as the original files have them: a blank one holds a space, paragraphs follow one another, other separators are text."""
ROWS = [
    "", " = Robert = \n", "", " He <unk> of Æ\x85, \u2028 1 @.@ 5 . \n", " Then he left . \n", "",
    " = = Life = = \n", "", " It ended . \n", "",
]  # fmt: skip
"""The same as the hub has it."""


@pytest.mark.parametrize("name", ["wiki.{}.raw", "raw-{}.txt"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_an_original_file_gives_the_text_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, end: str) -> None:
    monkeypatch.setenv(WIKITEXT2_VARIABLE, str(tmp_path))
    for split, purpose in (("test", "evaluation"), ("train", "calibration")):
        file = tmp_path / name.format(split)
        file.write_bytes(ORIGINAL.replace("\n", end).encode())
        assert load_text("wikitext2", purpose).content == "\n\n".join(ROWS)  # type: ignore[arg-type]
        file.write_bytes("\n\n".join(ROWS).replace("\n", end).encode())  # what has been joined before
        assert load_text("wikitext2", purpose).content == "\n\n".join(ROWS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\n = T = \n\n One . \n Two . \n", "\n\n = T = \n\n\n\n\n One . \n\n\n Two . \n"),  # blank lines without their space
        (" \n = T = \n \n One .", "\n\n = T = \n\n\n\n\n One ."),  # no two paragraphs
        ("one\n\ntwo", "one\n\ntwo"),  # rows without their line breaks
        ("words\n", "words\n"),
        ("", ""),
    ],
)
def test_an_original_file_is_known_by_its_lines(content: str, expected: str) -> None:
    assert joined_rows(content) == expected
    assert joined_rows(expected) == expected


def test_a_text_without_bos(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "a"}\n', encoding="utf-8")
    assert load_text(f"{lines},column=body", "evaluation") == Text("lines.jsonl", "a")
    for source in (f"{lines},column=body,add_bos_token=false", f"{lines},add_bos_token=false,column=body"):
        assert load_text(source, "evaluation") == Text("lines.jsonl without BOS", "a", add_bos_token=False)
    assert load_text("topics,add_bos_token=true", "evaluation") == topics("evaluation")
    with pytest.raises(UserError, match="add_bos_token is true or false"):
        load_text("topics,add_bos_token=no", "evaluation")


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
