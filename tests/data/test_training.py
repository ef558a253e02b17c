"""Windows to train on: packing, order, what is held out, what is left out, and text that is too short."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fptquant.data import training
from fptquant.data.overlap import Passages
from fptquant.data.text import Documents, Text, load_text
from fptquant.data.training import TrainingData, training_windows
from fptquant.errors import UserError
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def prose(letters: int, seed: int) -> str:
    """Words and paragraphs that do not repeat themselves."""
    draw = random.Random(seed)
    words: list[str] = []
    while sum(map(len, words)) + len(words) < letters:
        words.append("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) + draw.choice(["", "", "", ".\n\n"]))
    return " ".join(words).replace("\n\n ", "\n\n")


def cut(source: str | Text, **options: Any) -> TrainingData:
    sizes: dict[str, Any] = {"windows": 8, "window": 50, "held_out": 2, "seed": 0}
    return training_windows(TOKENIZER, source, **(sizes | options))


def texts(rows: Tensor) -> list[str]:
    return [TOKENIZER.decode(row) for row in rows]


def write_documents(path: Path, count: int) -> list[str]:
    """Documents of 120 letters."""
    documents = [f"{index:04d} " + prose(140, index)[:115].strip().ljust(115, "z") for index in range(count)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return documents


def test_windows_of_one_text_are_its_pieces_and_the_end_is_held_out() -> None:
    text = Text("prose", prose(3000, 1))
    data = cut(text, windows=20)
    assert data.train.shape == (20, 50)
    assert data.held_out.shape == (2, 50)
    assert data.train.dtype == data.held_out.dtype == torch.int64
    places = [text.content.index(window) for window in texts(data.train)]
    assert all(place % 50 == 0 for place in places)
    assert len(set(places)) == 20
    assert places != sorted(places)
    first_held_out = text.content.index(texts(data.held_out)[0])
    assert max(places) + 50 <= first_held_out
    assert text.content[first_held_out - 2 : first_held_out] == "\n\n"
    assert len(text.content) - first_held_out < 3 * 2 * 50 + 100
    assert (data.source, data.dropped) == ("prose", 0)
    assert data.epochs == pytest.approx(20 / (first_held_out // 50))


def test_the_seed_decides_the_order() -> None:
    text = Text("prose", prose(3000, 1))
    first, again, other = cut(text), cut(text), cut(text, seed=1)
    assert torch.equal(first.train, again.train)
    assert first.digest == again.digest
    assert len(first.digest) == 64
    assert not torch.equal(first.train, other.train)
    assert torch.equal(first.held_out, other.held_out)
    assert first.digest != other.digest
    assert torch.equal(cut(text, windows=30).train[:8], first.train)  # a longer run begins like a shorter one


def test_a_short_text_repeats_in_new_orders() -> None:
    data = cut(Text("prose", prose(700, 1)), windows=40)
    different = len(set(texts(data.train)))
    assert data.epochs == pytest.approx(40 / different)
    assert data.epochs > 3
    passes = [texts(data.train)[begin : begin + different] for begin in (0, different)]
    assert set(passes[0]) == set(passes[1])
    assert passes[0] != passes[1]


def test_distinct_windows_repeat_though_the_text_has_more() -> None:
    text = Text("prose", prose(3000, 1))
    data, all_of_them = cut(text, windows=20, distinct=6), cut(text, windows=20)
    passes = [texts(data.train)[begin : begin + 6] for begin in (0, 6, 12)]
    assert passes[0] == texts(all_of_them.train)[:6]
    assert set(passes[0]) == set(passes[1]) == set(passes[2])
    assert passes[0] != passes[1] != passes[2]
    assert data.epochs == pytest.approx(20 / 6)
    assert torch.equal(cut(text, windows=20, distinct=2000).train, all_of_them.train)


def test_documents_are_joined_by_blank_lines_and_held_out_whole(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "pages.jsonl", 60)
    data = cut(str(tmp_path / "pages.jsonl"), windows=40)
    assert (data.source, data.epochs, data.dropped) == ("pages.jsonl", 1.0, 0)
    for windows in (data.train, data.held_out):
        for window in texts(windows):
            parts = window.split("\n\n")
            assert all(any(part in document for document in documents) for part in parts)
    numbers = {
        window[place : place + 4] for window in texts(data.train) for place in range(47) if window[place : place + 4].isdigit()
    }
    held_out = {document[:4] for document in documents if any(part in document for part in texts(data.held_out)[0].split("\n\n"))}
    assert held_out
    assert not numbers & held_out
    assert cut(str(tmp_path / "pages.jsonl"), windows=40).digest == data.digest
    assert cut(str(tmp_path / "pages.jsonl"), windows=40, seed=1).digest != data.digest


def test_no_more_documents_are_read_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield prose(300, read)

    monkeypatch.setattr(training, "open_documents", lambda source: Documents("endless", endless()))
    data = cut("dclm-edu", windows=100)
    needed = (100 + 2) * 50 / 300
    assert data.train.shape == (100, 50)
    assert needed < read < 256 + 2 * needed  # those among which the stream is shuffled, too
    assert data.epochs == 1.0


def test_shuffling_a_stream_keeps_its_texts() -> None:
    numbers = [str(index) for index in range(1000)]
    shuffled = list(training._shuffled(iter(numbers), 3))
    assert sorted(shuffled) == sorted(numbers)
    assert shuffled == list(training._shuffled(iter(numbers), 3))
    assert sum(a == b for a, b in zip(shuffled, numbers, strict=True)) < 50
    long = (f"{index:09d}" * 10**6 for index in range(100))
    assert [text[:9] for text in islice(training._shuffled(long, 0), 3)] != ["000000000", "000000001", "000000002"]


def test_windows_that_share_a_passage_with_an_excluded_text_are_left_out() -> None:
    text = Text("prose", prose(5000, 1))
    evaluation = Text("evaluation", prose(500, 2) + text.content[1010:1110] + text.content[-140:])
    data = cut(text, windows=200, excluded=[evaluation])
    without = cut(text, windows=200)
    assert data.dropped >= 3 + 1
    left_out = set(texts(without.train)) - set(texts(data.train))
    assert {text.content[place : place + 50] for place in (1000, 1050, 1100)} <= left_out
    assert not Passages([evaluation]).shared(["".join(texts(data.held_out))]).any()
    assert cut(text, excluded=[Text("another", prose(5000, 3))]).dropped == 0


def test_training_on_the_evaluation_text_is_refused_with_both_names() -> None:
    content = prose(3000, 1)
    with pytest.raises(UserError, match=r"windows of the training text mine share passages with theirs, and 0 others"):
        cut(Text("mine", content), excluded=[Text("theirs", content.replace("\n\n", "\n"))])


def test_topics_without_their_held_out_part() -> None:
    evaluation = load_text("topics", "evaluation")
    data = cut("topics", windows=64, window=2048, held_out=4, excluded=[evaluation])
    assert data.source == "topics (calibration part)"
    assert 0 < data.dropped < 40
    assert data.epochs < 1
    everything = Passages([evaluation, Text("held out", "".join(texts(data.held_out)))])
    assert not any(everything.shared([window]).any() for window in texts(data.train))


def test_too_little_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"training text few gives 1 windows of 50 tokens; 2 held-out windows and at least one"):
        cut(Text("few", prose(80, 1)))
    with pytest.raises(UserError, match=r"0 windows of 50 tokens and 2 held out cannot be trained on"):
        cut("topics", windows=0)
    with pytest.raises(UserError, match="needs the model"):
        cut("model")


def test_a_text_without_paragraphs_is_cut_anywhere() -> None:
    text = Text("digits", "".join(str(number) for number in range(1000, 1500)))
    data = cut(text, windows=10)
    assert texts(data.held_out)[0] in text.content[-160:]
    assert all(text.content.index(window) % 50 == 0 for window in texts(data.train))


def test_a_bos_is_not_asked_for_where_there_is_none() -> None:
    with pytest.raises(UserError, match="add_bos_token has no effect"):
        cut("topics,add_bos_token=false")
