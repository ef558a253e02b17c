"""Evaluations that are killed go on: what was scored is not scored again, and the result is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fptquant.errors import UserError
from fptquant.evaluation.evaluate import Evaluation, build_reference, evaluate_windows
from fptquant.evaluation.teacher import TeacherCache
from fptquant.files import KeptFiles
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

WINDOWS = 4


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher, student = (tiny_model("LlamaForCausalLM", seed=seed, vocab_size=VOCABULARY) for seed in (0, 1))
    return teacher, student


def measure(teacher: PreTrainedModel, student: PreTrainedModel, folder: Path | None) -> tuple[TeacherCache, list[Evaluation]]:
    """The reference, and the evaluations of teacher and student without their times."""
    kept = None if folder is None else KeptFiles(folder, seconds=0)
    cache, first = build_reference(teacher, tiny_tokenizer(), text="topics", windows=WINDOWS, window=32, kept=kept)
    file = None if kept is None else kept.file("student.json")
    second = evaluate_windows(student, cache.tokens, text_name="topics", reference=cache, kept=file)
    return cache, [replace(found, seconds=0.0) for found in (first, second)]


@pytest.mark.parametrize("last", [1, 3, WINDOWS, WINDOWS + 1, WINDOWS + 3])
def test_what_was_done_is_found_again(tmp_path: Path, last: int) -> None:
    teacher, student = models()
    expected_cache, expected = measure(teacher, student, None)
    count = [0]

    def forward(*unused: object) -> None:
        count[0] += 1
        if count[0] == last:
            raise KeyboardInterrupt

    for model in (teacher, student):
        model.model.register_forward_pre_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        measure(teacher, student, tmp_path)
    cache, found = measure(teacher, student, tmp_path)
    assert found == expected
    assert torch.equal(cache.hidden, expected_cache.hidden)
    assert count[0] == 2 * WINDOWS + 1  # the one that was interrupted came twice
    assert measure(teacher, student, tmp_path)[1] == expected
    assert count[0] == 2 * WINDOWS + 1


def test_other_models_and_texts_are_scored_anew(tmp_path: Path) -> None:
    teacher, student = models()
    measure(teacher, student, tmp_path)
    for model in (teacher, student):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        changed = measure(teacher, student, tmp_path)[1]
        assert changed == measure(teacher, student, None)[1]
    (tmp_path / "student.json").write_text("{")
    assert measure(teacher, student, tmp_path)[1] == changed
    for states in tmp_path.glob("*.safetensors"):
        states.write_bytes(states.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        measure(teacher, student, tmp_path)


def test_what_is_found_again_is_not_shown_as_work(tmp_path: Path) -> None:
    """The time that is left is judged by the windows since the first that was shown."""
    teacher, _ = models()
    shown: list[int] = []

    def build(windows: int) -> None:
        kept = KeptFiles(tmp_path, seconds=0)
        build_reference(
            teacher, tiny_tokenizer(), text="topics", windows=windows, window=32, kept=kept,
            progress=lambda done, total, what: shown.append(done) if what == "full precision" else None,
        )  # fmt: skip

    build(3)
    assert shown == [0, 1, 2, 3]
    shown.clear()
    build(5)
    assert shown == [3, 4, 5]


def test_nothing_is_written_before_a_minute_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fptquant.files.time.monotonic", lambda: now[0])
    kept = KeptFiles(tmp_path / "kept")
    first, second = kept.file("first"), kept.file("second")
    first.write(lambda: b"old")
    now[0] += 59
    first.write(lambda: b"new")
    assert not kept.folder.exists()
    now[0] += 1
    second.write(lambda: b"second")
    assert (first.path.read_bytes(), second.path.read_bytes()) == (b"new", b"second")
    first.write(lambda: b"later")
    assert first.path.read_bytes() == b"new"
